"""The compiled model: a callable module around a program, its plan and its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .analysis.cacheable import cache_refusals
from .ir.errors import UsageError
from .ir.graph import Program
from .ir.interpret import run as run_plain
from .ir.serial import to_json
from .pipeline.compile import Compiled
from .pipeline.data import Tokenizer
from .pipeline.equivalence import Equivalence
from .pipeline.plan import Migration, Plan
from .report.data import report, times
from .runtime.executor import INPUTS, Runner
from .runtime.exits import ExitRunner
from .runtime.generate import Sampling
from .runtime.generate import generate as run_generation
from .runtime.lowering import runner_for

if TYPE_CHECKING:
    from .runtime.artefact import Contents, Loaded
    from .runtime.manifest import Manifest

Resident = Literal["packed", "dense"]


class Model(torch.nn.Module):
    """A compressed model: ``model(input_ids)`` gives logits [B, S, vocabulary].

    Attributes:
        program: the rewritten graph with its tensors; ``graph`` is another name of it.
        plan: what was planned; None for a loaded artefact.
        record: what decided the result: recipe, calibration data, settings.
        loaded: the artefact that it came from, if it came from one.
        tokenizer: of the model, None where it has none.
        target: what the graph is lowered for.
        dtype: in which it computes; None for the program's own (fp32).
        resident: ``packed`` decodes weights in every call, ``dense`` once, which takes memory.
        compiled: int4 products are compiled for this machine's CPU, once, into the user's cache.
        layers_used: blocks executed for each new token of the last ``generate``, by prompt; None
            for a model without exits. A prompt, and so its first new token, takes all of them.
    """

    def __init__(
        self,
        program: Program,
        solved: Compiled | None,
        record: dict[str, Any],
        tokenizer: Tokenizer | None = None,
        target: str = "reference",
        *,
        dtype: torch.dtype | None = None,
        resident: Resident = "packed",
        seconds: float = 0.0,
        loaded: Loaded | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.loaded, self.dtype, self.resident = loaded, dtype, resident
        self.compiled = compiled
        self.program, self.solved, self.record = program, solved, record
        self.tokenizer, self.target, self.seconds = tokenizer, target, seconds
        self.layers_used: list[list[int]] | None = None
        self.eval()

    @property
    def graph(self) -> Program:
        """The program; ``graph.print_python()`` shows it."""
        return self.program

    @property
    def plan(self) -> Plan | None:
        return None if self.solved is None else self.solved.plan

    @cached_property
    def report(self) -> dict[str, Any]:
        """Sites with error, bits, bytes and tokens, folds, fallbacks, refusals, totals, record."""
        if self.solved is not None:
            return report(self.solved) | {"record": self.record}
        return dict(self.loaded.report) if self.loaded is not None else {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """One row per compressed weight."""
        return self.solved.records if self.solved is not None else self.report.get("sites", [])

    @property
    def folds(self) -> list[dict[str, Any]]:
        """One row per migrated scale."""
        return self.solved.folds if self.solved is not None else self.report.get("folds", [])

    @cached_property
    def runner(self) -> Runner:
        """The program lowered for ``target``, without cache."""
        return self._lowered(cached=False)

    @cached_property
    def generator(self) -> Runner:
        """The program with a KV cache where it can have one, lowered for ``target``."""
        if cache_refusals(self.program):
            return self.runner
        return self._lowered(cached=True)

    @cached_property
    def full_generator(self) -> Runner:
        """:attr:`generator` with its exits off: every token runs every block."""
        if self.program.exits is None or not self.generator.cached:
            return self.generator
        return self._lowered(cached=True, exits=False)

    def _lowered(self, *, cached: bool, exits: bool = True) -> Runner:
        return runner_for(
            self.program, self.target, cached=cached, dtype=self.dtype, resident=self.resident,
            exits=exits, compiled=self.compiled,
        )  # fmt: skip

    def why_no_cache(self) -> str:
        """Why generation runs without a KV cache; empty where it has one."""
        refused = cache_refusals(self.program)
        return str(refused[0]) if refused else ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits [B, S, vocabulary] of ``input_ids`` int64 [B, S].

        Args:
            attention_mask: [B, S], 0 or False for padding.
            position_ids: int64 [B, S]; by default real tokens counted from the left.

        A module that is no language model takes and gives what it did before.
        """
        if self.reads_tokens:
            return self.runner.forward(*args, **kwargs)
        names = [n.name for n in self.program.inputs]
        with torch.no_grad():
            return run_plain(self.program, {**dict(zip(names, args, strict=False)), **kwargs})

    @property
    def reads_tokens(self) -> bool:
        """Whether the program is a language model: it reads ``input_ids`` and what goes with it."""
        return {"input_ids"} <= {n.name for n in self.program.inputs} <= set(INPUTS)

    def generate(
        self,
        prompts: str | Sequence[str] | torch.Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Any:
        """Continue prompts; greedy unless ``temperature`` is above 0.

        Args:
            prompts: a text, texts, token ids int64 [B, S] or lists of ids.
            on_token, on_note: see :func:`~llmc.compiler.runtime.generate.generate`.
        Returns:
            For texts the new text (one string for one string), else lists of new token ids.
        Raises:
            UsageError: texts without a tokenizer, an empty prompt, or a bad setting.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids, texts = self._ids(prompts)
        eos = self.program.facts.get("eos") or ()
        if self.tokenizer is not None and not eos:
            eos = self.tokenizer.eos
        used: list[list[int]] = [[] for _ in ids]
        made = run_generation(
            self.generator, ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=eos,
            on_token=on_token, on_depth=lambda row, blocks: used[row].append(blocks),
            on_note=on_note,
        )  # fmt: skip
        self.layers_used = used if isinstance(self.generator, ExitRunner) else None
        if not texts:
            return made
        assert self.tokenizer is not None
        new = [self.tokenizer.decode(row) for row in made]
        return new[0] if isinstance(prompts, str) else new

    def _ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        if isinstance(prompts, torch.Tensor):
            return prompts.reshape(-1, prompts.shape[-1]).tolist(), False
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        if not rows or not all(isinstance(r, str) for r in rows):
            return [list(r) for r in rows], False
        if self.tokenizer is None:
            raise UsageError(
                "expected token ids, found text and a model without a tokenizer",
                hint="pass tokenizer= to llmc.compile",
            )
        return [self.tokenizer.encode(r) for r in rows], True

    def save(
        self, path: str | Path, *, force: bool = False, command: Sequence[str] = ()
    ) -> Manifest:
        """Write an artefact folder, whole or not at all.

        Args:
            force: replace an existing folder once the new one is complete.
            command: what was typed, for run.json, which is outside the content hash.
        Raises:
            UsageError: the folder exists and ``force`` is not given, or nothing was compiled.
            ResourceError: no space; nothing was changed.
        """
        from .runtime import artefact

        return artefact.save(path, self._contents(command), force=force)

    def export(
        self, path: str | Path, *, format: str = "hf", dtype: torch.dtype | None = None,
        force: bool = False, drop_exits: bool = False,
        progress: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Write the model in another format; see :func:`.runtime.export.export`."""
        from .runtime.export import export

        side = None if self.tokenizer is None else self.tokenizer.folder
        return export(
            self.program, path, format=format, dtype=dtype, force=force, drop_exits=drop_exits,
            side=side, tell=progress,
        )  # fmt: skip

    def _contents(self, command: Sequence[str]) -> Contents:
        from .runtime.artefact import Contents, versions

        folder = None if self.tokenizer is None else self.tokenizer.folder
        if self.loaded is not None:
            a = self.loaded
            graphs = [(n.partition("-")[2], to_json(a.graph(n))) for n in a.graphs]
            return Contents(
                self.program, a.schemes, a.plan, a.report, a.run, a.manifest.passes,
                a.manifest.fallbacks, graphs, folder,
            )  # fmt: skip
        if self.solved is None:
            raise UsageError("expected a compiled model to save, found a dense one")
        plan = self.solved.plan
        data = self.record["calibration"] or {"samples": 0, "length": 0}
        run = {
            "command": list(command), "seconds": self.seconds, "host": host(),
            "versions": versions(), "times": times(self.solved),
        }  # fmt: skip
        return Contents(
            self.program,
            {name: scheme.to_json() for name, scheme in sorted(plan.schemes.items())},
            plan.to_json(data["samples"] * data["length"], data["length"]),
            self.report,
            run,
            applied(plan),
            self.solved.fallbacks,
            [(s.name, s.graph) for s in plan.snapshots],
            folder,
        )  # fmt: skip

    @classmethod
    def load(
        cls, path: str | Path, *, target: str = "reference", dtype: torch.dtype | None = None,
        resident: Resident = "packed", compiled: bool = False,
    ) -> Model:  # fmt: skip
        """See :func:`llmc.load`."""
        from .runtime import artefact

        found = artefact.load(Path(path).expanduser())
        tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer)
        record = found.report.get("record", {}) if isinstance(found.report, dict) else {}
        return cls(
            found.program, None, record, tokenizer, target, dtype=dtype, resident=resident,
            loaded=found, compiled=compiled,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.record.get('passes', 'dense')}, target={self.target}"


def applied(plan: Plan) -> list[dict[str, Any]]:
    """The passes in applied order: knobs, effect, number of sites, and what each rewrote.

    ``folds`` names the parameters that each scale migration of the pass rescales.
    """
    out = []
    for (i, call), snapshot in zip(plan.applied, plan.snapshots[1:], strict=True):
        folds = {
            m.site.id: fold_params(m, plan.source)
            for stage in plan.stages
            for m in stage.migrations
            if (stage.index, m.call.name) == (i, call.name)
        }
        out.append({
            "pass": call.name, "stage": i, "knobs": call.made.values(),
            "given": {k: v for k, v in call.made.values().items() if call.made.explicit(k)},
            "effect": snapshot.effect, "sites": snapshot.sites,
            "new_params": list(snapshot.rewrote), "folds": folds,
        })  # fmt: skip
    return out


def fold_params(m: Migration, program: Program) -> list[str]:
    """Parameters that a scale migration rewrites: readers, absorbers, then what a shift reaches."""
    assert isinstance(m.call.made, Equivalence)
    return list(dict.fromkeys(m.call.made.params(program, m.site)))


def host() -> dict[str, Any]:
    """Where it ran, without names: system, processors, torch threads."""
    import os
    import platform

    return {
        "system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
