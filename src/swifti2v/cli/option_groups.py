"""Options that several commands share: a dataclass declares them once, a decorator gives them to a command."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def with_option_group(command: Callable[..., None], *, parameter: str, group: type[Any]) -> Callable[..., None]:
    """Return `command` with the fields of `group`, a dataclass, as options in place of `parameter`, which takes one.

    Typer makes an option of each parameter of a signature, and knows no groups of them.
    """
    options = inspect.signature(group, eval_str=True).parameters
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        if each.name == parameter:
            parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]
        else:
            parameters.append(each)

    @wraps(command)
    def taking_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in options}
        command(**arguments, **{parameter: group(**given)})

    # Typer reads the one for the parameters, the other for their types.
    taking_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    taking_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return taking_options
