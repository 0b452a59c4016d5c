"""The settings of a video as options of a command: flags, help and types are those of `swifti2v.settings`."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from swifti2v.settings import DESCRIPTIONS, OPTIONS, TYPES, GenerationSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

STAGE_ONE_SETTINGS = tuple(
    name for name, option in OPTIONS.items() if option.decides != "stage two" and option.flag is not None
)
"""Names of the settings that a motion reference depends on, and of the file's."""


def with_setting_options(
    command: Callable[..., None] | None = None, *, only: Collection[str] = tuple(OPTIONS)
) -> Callable[..., Any]:
    """Return `command` with an option for each setting in place of its parameter `choices`.

    Args:
        command: its `choices` is a dict of what was given, by the name of the setting, ready for
            `TwoStagePipeline.request`.
        only: names of settings; the others get no option.
    """
    if command is None:
        return partial(with_setting_options, only=only)
    options = {name: _parameter(name) for name in only if OPTIONS[name].flag is not None}
    signature = inspect.signature(command, eval_str=True)
    others = [each for each in signature.parameters.values() if each.name != "choices"]
    parameters = [*others, *options.values()]

    @wraps(command)
    def taking_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in options}
        command(**arguments, choices={name: value for name, value in given.items() if value is not None})

    # Typer reads the one for the parameters, the other for their types.
    taking_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    taking_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return taking_options


def _parameter(name: str) -> inspect.Parameter:
    option, kind = OPTIONS[name], TYPES[name]
    if kind not in {bool, int, float, str} and get_origin(kind) is not Literal:
        kind = next((part for part in get_args(kind) if part in {int, float}), str)
    default = getattr(GenerationSettings, name, None)
    flag = typer.Option(
        option.flag,
        help=DESCRIPTIONS[name],
        rich_help_panel=None if option.panel == "Main" else option.panel,
        show_default="the checkpoint's" if default is not None and kind is not bool else False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
    )
