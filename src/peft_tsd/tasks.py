"""`peft_tsd.tasks`: the tasks of `peft_tsd.language`, under the path at which they have always been public."""

from .language.tasks import Chat, Classification, Example, Family, Generation, Glue, Material, load_examples, load_task

__all__ = [
    "Chat",
    "Classification",
    "Example",
    "Family",
    "Generation",
    "Glue",
    "Material",
    "load_examples",
    "load_task",
]
