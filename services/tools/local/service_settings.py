"""The services' settings classes, and the check of all settings before anything of a stack starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from services.tools.local.folder import checkout
from services.tools.local.service_commands import ServiceCommands
from services.tools.local.settings import LocalSettings
from shared.errors import ModelError, SettingsError
from shared.runtime.settings import WispSettings, variable, variables
from shared.runtime.settings_loading import from_environment, misspelt, problems_of

CLASSES = {
    "gateway": ("services.gateway.settings", "GatewaySettings"),
    "drafter": ("services.drafter.settings", "DrafterSettings"),
    "scheduler": ("services.scheduler.settings", "SchedulerSettings"),
    "estimator": ("services.estimator.settings", "EstimatorSettings"),
    "verifier": ("services.verifier.settings", "VerifierSettings"),
    "drainorder": ("services.drain_order.settings", "DrainOrderSettings"),
    "baseline": ("services.baseline.settings", "BaselineSettings"),
    "device": ("services.device.settings", "DeviceSettings"),
}
"""Module and name of each service's settings class. A module is loaded only when its service is used."""


def settings_class(service: str) -> type[WispSettings]:
    """Return the settings class of a service in CLASSES."""
    module, name = CLASSES[service]
    kind: type[WispSettings] = getattr(import_module(module), name)
    return kind


def refuse_bad_settings(
    commands: ServiceCommands, env_of: Mapping[str, Mapping[str, str]], *, target_known: bool = True
) -> None:
    """Raise a SettingsError with every problem that the services would have with their settings.

    env_of: the services to check, each with variables of its own, as for `ServiceCommands.environment`.
    target_known: the target of `commands` is the one to serve, so that a draft model is compared with it.
    """
    problems: dict[str, None] = dict.fromkeys(_misspelt(commands.inherited))
    for service, own in env_of.items():
        environment = commands.environment(service, f"{service}-1", own)
        problems |= dict.fromkeys(_problems(settings_class(service), environment, target_known))
    if problems:
        raise SettingsError("\n".join(problems))


def _misspelt(environment: Mapping[str, str]) -> Iterator[str]:
    kinds: list[type[WispSettings]] = [LocalSettings, *map(settings_class, CLASSES)]
    for name, near in misspelt(environment, {known for kind in kinds for known in variables(kind)}).items():
        yield f"{name}: no setting has this name; did you mean {near}?"


def _problems(kind: type[WispSettings], environment: Mapping[str, str], target_known: bool) -> Iterator[str]:
    try:
        settings = from_environment(kind, environment)
    except ValidationError as error:
        yield from problems_of(error, options=False)
        return
    for name, field in kind.model_fields.items():
        value = getattr(settings, name)
        # The services run in the checkout. The target is prepared later, and a drafter creates its folder.
        if (
            name not in ("target", "draft_learning_folder")
            and isinstance(value, Path)
            and value != field.default
            and not (checkout() / value).exists()
        ):
            yield f"{variable(name)}: there is no {value}"
    if target_known:
        yield from _unfit_draft(settings)
    if profile := getattr(settings, "device_profile", ""):
        from services.drafter.link import load_profile

        try:
            load_profile(profile)
        except SettingsError as error:
            yield str(error)


def _unfit_draft(settings: WispSettings) -> Iterator[str]:
    """Yield why a draft model does not fit the target, if both folders are there."""
    draft, target = (getattr(settings, name, None) for name in ("draft_model", "target"))
    if not isinstance(draft, Path) or not isinstance(target, Path):
        return
    if not (checkout() / draft).is_dir() or not (checkout() / target).is_dir():
        return
    from services.drafter.sources.pairing import covered
    from shared.models.folder import ModelFolder

    try:
        covered(ModelFolder(checkout() / draft), ModelFolder(checkout() / target))
    except ModelError as error:
        yield f"{variable('draft_model')}: {error}"
