"""The seven recurrences as pure functions; each file gives the equation, its definition, and a fast form."""

from bestiary.ops.dispatch import active, use
from bestiary.ops.short_convolution import short_convolution

__all__ = ["active", "short_convolution", "use"]
