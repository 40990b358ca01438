"""What is known of a tensor, as an attribute of the tensor itself: it is gone with it."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor

_Note = TypeVar("_Note", bound="Note")


class Note:
    """Base of what is noted of tensors. Who copies or saves a tensor copies and saves its values alone.

    Attributes:
        name: of the attribute.
    """

    name: ClassVar[str]

    @classmethod
    def of(cls: type[_Note], x: Tensor) -> _Note | None:
        """What is noted of `x`."""
        return x.__dict__.get(cls.name) or None

    def attach(self, x: Tensor) -> None:
        """Note this of `x`, in place of what was noted before."""
        x.__dict__[self.name] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # An empty set is what `torch.load` lets through.
        return set, ()
