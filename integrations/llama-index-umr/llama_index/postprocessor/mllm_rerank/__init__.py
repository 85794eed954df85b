"""Reranking with a multimodal LLM for LlamaIndex, and a workflow that answers questions with pictures."""

from llama_index.postprocessor.mllm_rerank.base import MLLMRerank
from llama_index.postprocessor.mllm_rerank.judging import JudgedNode
from llama_index.postprocessor.mllm_rerank.workflow import RetrieveRerankAnswer

__all__ = ["JudgedNode", "MLLMRerank", "RetrieveRerankAnswer"]
