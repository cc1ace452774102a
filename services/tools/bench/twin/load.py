"""A scenario of the simulator as load on the real suite: its requests, its devices and its target."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.drafter.core.profile import HardwareProfile, LinkProfile
from services.drafter.link import load_profile
from services.tools.bench.load.core.requests import LoadRequest
from services.tools.bench.load.workload import Workload, workload_of
from services.tools.simulator.core.scenario import Scenario
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

MOST_RUNNING = 256
"""Running sessions of centralized serving: as in the simulator."""
WORKLOAD = """
ignore_eos = true
classes = [{name = "all", ttft_ms = 1000, tpot_ms = 1000}]
temperatures = [{value = 0}]
"""


@dataclass(frozen=True)
class ScenarioRequests:
    """The requests of a scenario. Each prompt has the scenario's number of tokens of the given tokenizer."""

    scenario: Scenario
    seed: int
    tokenizer: Tokenizer
    _made: dict[tuple[int, int], LoadRequest] = field(default_factory=dict)

    def request(self, session: int, number: int) -> LoadRequest:
        """Return request `number` of a session."""
        if (session, number) not in self._made:
            self._made[session, number] = self._request(session, number)
        return self._made[session, number]

    def _request(self, session: int, number: int) -> LoadRequest:
        drawn = self.scenario.request(self.seed, session, number)
        # `think_s` is the pause before a request here, and after it in the simulator.
        pause_s = self.scenario.request(self.seed, session, number - 1).think_s if number else 0.0
        return LoadRequest(
            session=session,
            number=number,
            messages=[{"role": "user", "content": self.content(drawn.seed, drawn.prompt_tokens)}],
            max_tokens=drawn.output_tokens,
            temperature=self.scenario.temperature,
            seed=drawn.seed,
            ignore_eos=True,
            service_class=drawn.of_class.name,
            slo=drawn.of_class.slo,
            device=self.scenario.hardware(session),
            think_s=pause_s,
        )

    def content(self, seed: int, tokens: int) -> str:
        """Return random digits that make a prompt of this many tokens with the chat template, or the shortest one."""
        rng = random.Random(seed)
        digits = "".join(rng.choice("0123456789") for _ in range(tokens))
        # Tokenizers take digits one by one, or up to three at a time.
        length = max(1, tokens - self._length(""))
        for _ in range(8):
            found = self._length(digits[:length])
            if found == tokens or length >= len(digits) or length == 1:
                break
            length = min(len(digits), max(1, length + tokens - found))
        return digits[:length]

    def _length(self, content: str) -> int:
        return len(self.tokenizer.render_chat([{"role": "user", "content": content}]))


def load_of(scenario: Scenario, seed: int, folder: Path) -> tuple[Workload, ScenarioRequests]:
    """Return the workload and the requests of a scenario. The workload has the devices and the sessions' starts.

    folder: the target's, for its tokenizer.
    """
    devices = [{"name": device.profile, "weight": device.weight} for device in scenario.devices]
    workload = workload_of(WORKLOAD, seed)
    workload = Workload.model_validate({**workload.model_dump(), "devices": devices})
    return workload, ScenarioRequests(scenario, seed, Tokenizer(ModelFolder(folder)))


def service_settings(scenario: Scenario) -> dict[str, dict[str, str]]:
    """Return the settings by service with which the suite behaves as in the simulator."""
    return {
        "scheduler": {"WISP_MAX_BATCH_MS": str(scenario.max_batch_ms)},
        "drafter": {"WISP_DRAFT_LENGTH": str(scenario.draft_length)},
        "baseline": {
            "WISP_PREFILL_TOKENS": str(scenario.prefill_tokens),
            "WISP_MAX_RUNNING": str(MOST_RUNNING),
        },
    }


def write_devices(scenario: Scenario, folder: Path) -> Mapping[str, Path]:
    """Write the scenario's devices, with its link, as hardware profiles; return the file of each."""
    files = {}
    for device in scenario.devices:
        profile = load_profile(device.profile)
        assert profile is not None  # only an empty name has none
        if scenario.link is not None:
            profile = profile.model_copy(update={"uplink": scenario.link.uplink, "downlink": scenario.link.downlink})
        files[device.profile] = folder / f"{Path(device.profile).stem}.toml"
        files[device.profile].write_text(_toml(profile), encoding="utf-8")
    return files


def _toml(profile: HardwareProfile) -> str:
    """Return a hardware profile as a TOML file."""

    def link(name: str, one: LinkProfile) -> str:
        return f"[{name}]\ndelay_ms = {one.delay_ms}\njitter_ms = {one.jitter_ms}\n"

    draft = f"[draft]\nstep_ms = {profile.draft.step_ms}\nprompt_ms = {profile.draft.prompt_ms}\n"
    return draft + link("uplink", profile.uplink) + link("downlink", profile.downlink)
