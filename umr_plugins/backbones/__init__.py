"""Model families: what a checkpoint is (data, `registry`) and how it runs (one file per family).

Only this package imports transformers' model classes. Nothing here is imported before a model is loaded,
except `registry`, which imports no torch.
"""
