"""The errors that users meet: what was expected, what came, what to do."""

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "LOST_PROCESS",
    "BudgetError",
    "BusyError",
    "ClassesError",
    "ConversionError",
    "DataError",
    "EnsembleNetError",
    "ExportError",
    "FetchError",
    "FusionError",
    "InputError",
    "LoadError",
    "MissingExtraError",
    "ModelNameError",
    "TrainingError",
    "did_you_mean",
    "first_line",
    "without_secrets",
]

# what PyTorch says, in a RuntimeError, to a process that waits for one that has ended or stands still
LOST_PROCESS = (
    r"(?i)gloo.*(timed out|closed by peer|reset by peer|refused)|NCCL.*(timeout|remote process|aborted)|"
    r"Connection (closed|reset) by peer|socket has (timed out|failed)|wait timeout after|waiting for clients"
)


class EnsembleNetError(Exception):
    """Base of every error that a user can mend; commands print its message and exit with code 2.

    Example:
        >>> print(EnsembleNetError("a name with\\na line break"))
        a name with\\na line break
    """

    def __str__(self) -> str:
        """The message in one line, without secrets: names that a damaged or hostile file gives may hold anything."""
        text = without_secrets(super().__str__())
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class ConversionError(EnsembleNetError, ValueError):
    """A network that cannot be converted as asked."""


class BudgetError(ConversionError):
    """A budget that no width can meet."""


class DataError(EnsembleNetError, ValueError):
    """Data that is missing, damaged, or not of the expected form."""


class ClassesError(DataError):
    """Data whose classes are not those of the training."""


class FetchError(DataError):
    """Data that its server does not give; never one broken example among others, which may be skipped."""


class ExportError(EnsembleNetError, RuntimeError):
    """A model that cannot be written as asked, or whose file does not give what the model gives."""


class FusionError(EnsembleNetError, ValueError):
    """A model whose heads cannot run as one."""


class InputError(EnsembleNetError, ValueError):
    """Inputs of a size for which a model was not converted."""


class LoadError(EnsembleNetError, ValueError):
    """A saved directory that is damaged, foreign, or does not fit the base."""


class ModelNameError(EnsembleNetError, ValueError):
    """A name that no network, or no argument of one, goes by; or weights that do not fit the network."""


class TrainingError(EnsembleNetError, RuntimeError):
    """A training run that cannot go on, such as one whose loss became non-finite."""


class BusyError(TrainingError):
    """A run folder that another process is writing."""


class MissingExtraError(EnsembleNetError, ImportError):
    """A library that a part of the package needs is not installed; the message says how to install it."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a message about a name that is not known: those that are most like it, if any.

    Example:
        >>> did_you_mean("resnet81", ["resnet18", "vgg11"]), did_you_mean("x", ["resnet18"])
        (' Did you mean resnet18?', '')
    """
    near = difflib.get_close_matches(name, list(known), n=most)
    return f" Did you mean {', '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message of one line.

    Example:
        >>> first_line(ValueError("no such thing\\nbecause of ...")), first_line(KeyError())
        ('no such thing', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def without_secrets(text: str) -> str:
    """A text without the names, passwords and signatures in its URLs.

    Example:
        >>> without_secrets("https://me:word@host/a.tar?X-Amz-Signature=12&x=3: 503")
        'https://host/a.tar: 503'
    """
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\":)]*=[^\s'\":)]*", r"\1", re.sub(r"(\w://)[^\s/'\"]*@", r"\1", text))
