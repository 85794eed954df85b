"""Which instruction an input is written with."""

from __future__ import annotations

from umr_plugins.backbones.spec import ModelSpec
from umr_plugins.errors import InputError
from umr_plugins.types import Role


def instruction_for(spec: ModelSpec, instruction: str | None, role: Role) -> str | None:
    """What fills the template's slot: the model's own instruction for documents, and where none is given.

    Raises:
        InputError: an instruction for a document, a blank one, or one for a model that takes none.
    """
    if instruction is None:
        return spec.default_instruction
    if role == "document":
        raise InputError(
            "documents are always encoded with the model's own instruction; pass yours to encode_queries"
        )
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"instruction must be a sentence or None, got {instruction!r}")
    if not spec.takes_instruction:
        raise InputError(f"{spec.name} was trained without instructions; leave instruction=None")
    return spec.punctuated(instruction)
