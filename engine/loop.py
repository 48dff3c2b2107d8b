"""The training loop of one run: batches, updates, evaluations, checkpoints, and what is told on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

import variations
from core.weights import load_weights, weights
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.base import load_base
from engine.data import Batches, Corpus, gather, windows
from engine.device import autocast, claim, first_scale, move, next_scale, peak_memory, seed, synchronise
from engine.optim import Optimizers
from engine.ranks import Ranks
from engine.state import Paused, Tracker
from engine.state import State as State
from engine.state import Stopped as Stopped
from model import GPT, assemble, fill, refill
from train_args import Config
from variations.dropout import Dropout, set_step

EVAL_SEED = 20240229  # the same windows for every run, so that losses compare
SEEDS = 2**63  # torch's generators take seeds below it
Ask = tuple[Any, ...]  # what a run asks for, and with what


class Run:
    """A run of a configuration on a device. `tracker` takes its records, `say` its lines for people, `stop()` asks it to end.

    Resumes from the newest checkpoint in `folder`; on a CPU the result is bit for bit that of an undisturbed run. `ranks`: where
    several processes train it, each of which does all of this but for writing.
    """

    def __init__(
        self, config: Config, corpus: Corpus, folder: Path, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        torch.set_float32_matmul_precision(config.train.matmul_precision)
        claim(device, config.train.deterministic)
        self.config, self.corpus, self.folder, self.device = config, corpus, folder, device
        init_seed, data_seed = config.seeds
        self.plain: GPT
        self.plain, self.rows = assemble(config.model, config.slices, config.optimizer)
        fill(self.plain, self.rows, init_seed, device)
        saved = checkpoint.resumed(folder / "checkpoint")
        if config.run.base and saved is None:  # a run on its way needs it no more
            load_base(self.plain, config.run.base)
            refill(self.plain, self.rows, init_seed)
        self.model: Any = self.plain.compiled() if config.train.compile else self.plain
        self.optimizers = Optimizers(self.plain, self.rows)
        self.schedule = variations.CATALOGUE["schedule"][config.schedule.name](
            config.schedule.options, config.iterations
        )
        size = {"batch_size": config.train.batch_size, "block_size": config.model.block_size}
        self.batches = Batches(corpus.train, **size, seed=data_seed)
        self.state = State(threads=torch.get_num_threads(), grad_scale=first_scale(config.train.dtype))
        self.dropping = any(isinstance(m, Dropout) and m.on for m in self.plain.modules())
        self.ranks = ranks or Ranks()
        self.share = self.ranks.share(self.plain, config.train.batch_size, config.train.gradient_accumulation_steps)
        self.losses: list[Any] = []  # tensors, or numbers where others have read them from the device
        self.fetch: Callable[[], None] | None = None  # what does that, before losses are looked at
        self.grad_norm: Any = None
        self.slice_norms: list[Tensor] = []  # of the gradient, by trained slice
        self.telemetry: Tensor | None = None  # [3, trained slices] of the last update that was watched
        if saved is not None:
            self.resume(saved)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint. Raises ConfigError where it is of another model."""
        try:
            self.state = State(**saved.state)
            load_weights(self.plain, saved.model())
            self.optimizers.load(saved.optimizer())
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{saved.folder}: {error}. Remove {saved.folder.parent} to start the run anew."
            ) from error
        if self.device.type == "cpu" and self.state.threads:
            torch.set_num_threads(self.state.threads)

    def save(self) -> None:
        """Writes a checkpoint. Raises ConfigError with a sentence where the disk does not take it; older ones stay."""
        root = self.folder / "checkpoint"
        self.ranks.alike(self.state.iter, weights(self.plain).values())
        if self.ranks.rank:
            return
        try:
            checkpoint.save(root, self.state.iter, weights(self.plain), self.optimizers.state(), vars(self.state))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{root}: the checkpoint of iteration {self.state.iter} could not be written ({error}). "
                "Make room or mend the folder and give the same command again; earlier checkpoints are kept."
            ) from error

    # One update -------------------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One iteration: forward and backward over the micro-batches, clipping, a step at the schedule's rate."""
        train, i, share = self.config.train, self.state.iter, self.share
        self.optimizers.zero_grad()
        total: Tensor | None = None
        for j in share.passes:
            told = self.gradient(i * train.gradient_accumulation_steps + j)
            total = told if total is None else total + told
        assert total is not None
        self.losses.append(self.ranks.reduce(self.optimizers.live, total))
        self.step()
        self.state.iter += 1

    def gradient(self, micro: int) -> Tensor:
        """Forward and backward of a micro-batch, counted from the first of the run. Returns its part of the update's loss []."""
        train, share = self.config.train, self.share
        # For variations that draw from torch's generator: not the same numbers for other rows of a batch.
        seed((train.seed * 1_000_003 + micro + share.part * 2**40) % SEEDS, self.device)
        if self.dropping:
            set_step(self.plain, train.seed, micro)
        x, y = (move(t[share.rows], self.device) for t in self.batches(micro))
        with autocast(self.device, train.dtype):
            _, loss = self.model(x, y)
        loss = loss / share.parts if share.parts > 1 else loss
        (loss * self.state.grad_scale if self.state.grad_scale != 1.0 else loss).backward()
        told: Tensor = loss.detach()
        if (extra := self.plain.auxiliary) is not None:  # cross entropy alone compares with other models'
            told = told - extra / share.parts
        return told

    def step(self) -> None:
        """The rest of an update, when the gradients of all micro-batches are there."""
        i = self.state.iter
        if self.clip():
            every = self.config.tracking.slice_interval
            watching = every is not None and (i + 1) % every == 0
            before = [p.detach().clone() for p in self.optimizers.live] if watching else []
            self.optimizers.step(self.schedule.multiplier(i))
            self.state.steps += 1
            if watching:
                self.watch(before)

    @torch.no_grad()
    def watch(self, before: list[Tensor]) -> None:
        """Measures every trained slice: the norms of weight and gradient before the update, and the update's relative size."""
        optimizers, old = self.optimizers, dict(zip(map(id, self.optimizers.live), before, strict=True))
        weight = torch.stack(optimizers.norms(lambda p: old[id(p)]))
        update = torch.stack(optimizers.norms(lambda p: p.detach() - old[id(p)]))
        gradient = {row.slice.address: norm for row, norm in zip(optimizers.graded(), self.slice_norms, strict=True)}
        none = weight.new_full((), math.nan)
        grads = torch.stack([gradient.get(row.slice.address, none) for row in optimizers.trained])
        self.telemetry = torch.stack([weight, grads, update / weight])

    @torch.no_grad()
    def clip(self) -> bool:
        """Unscales and clips the gradient; False where a float16 overflow means that this step is left out."""
        gradients, limit, state = self.optimizers.gradients(), self.config.train.grad_clip, self.state
        scale = state.grad_scale
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1 / scale)
        self.slice_norms = self.optimizers.norms(lambda p: p.grad)
        self.grad_norm = torch.linalg.vector_norm(torch.stack(self.slice_norms))
        if self.config.train.dtype == "float16":
            finite = math.isfinite(self.grad_norm.item())
            state.grad_scale, state.fitting = next_scale(scale, state.fitting, finite)
            if not finite and scale > 1.0:  # with nothing left to halve, the step is made and the run seen to diverge
                return False
        if limit is not None:
            torch._foreach_mul_(gradients, (limit / (self.grad_norm + 1e-6)).clamp(max=1.0))
        return True

    def flush(self) -> int | None:
        """Moves losses from the device to the state; the iteration of the first that is not finite, if any."""
        if self.fetch is not None:
            self.fetch()
        on_device = bool(self.losses) and isinstance(self.losses[0], Tensor)
        values = torch.stack(self.losses).tolist() if on_device else self.losses
        first, self.losses = self.state.iter - len(values) + 1, []
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self.state.train_loss = None
                return first + i
            self.state.pending.append(value)
            self.state.train_loss = value
        return None

    # Evaluation -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, iters: int | str) -> float:
        """Mean cross entropy in nats per token over fixed windows of the validation split: `iters` batches, or all of it."""
        seed(EVAL_SEED, self.device)  # for variations that draw
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0  # of this process's batches
        for batch in self.evaluated(iters):
            x, y = (move(t, self.device) for t in batch)
            with autocast(self.device, self.config.train.dtype):
                _, loss = self.model(x, y)
            total += loss.double() * len(x)
            count += len(x)
        self.model.train()
        loss, counted = self.ranks.total(total, count)
        return loss / counted

    def evaluated(self, iters: int | str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an evaluation, of which processes take turns: the same for every run."""
        size, block = self.config.train.eval_batch_size, self.config.model.block_size
        count = None if iters == "full" else int(iters) * size
        starts = windows(self.corpus.val, block_size=block, count=count, seed=EVAL_SEED)
        for first in range(self.ranks.rank * size, len(starts), self.ranks.count * size):
            yield gather(self.corpus.val, starts[first : first + size], block)

    # The whole run ----------------------------------------------------------------------------------------------------------

    def run(self, tracker: Tracker, say: Callable[[State, bool], None], stop: Callable[[], bool]) -> str:
        """Trains to the end. Returns 'done' or 'diverged'; raises Stopped after saving where it is."""
        course, answer = self.course(tracker, say, stop), None
        while True:
            try:
                ask = course.send(answer)
            except StopIteration as end:
                return str(end.value)
            answer = self.answer(ask)

    def answer(self, ask: Ask) -> Any:
        """Does what the course asks for, alone, and counts the time."""
        started = time.perf_counter()
        made = getattr(self, ask[0])(*ask[1:])
        self.count(ask[0], time.perf_counter() - started)
        return made

    def count(self, what: str, seconds: float) -> None:
        """Notes the time of an update or an evaluation."""
        self.state.seconds += seconds if what != "save" else 0.0
        self.state.train_seconds += seconds if what == "update" else 0.0

    def course(
        self,
        tracker: Tracker,
        say: Callable[[State, bool], None],
        stop: Callable[[], bool],
        rungs: Collection[int] = (),
    ) -> Generator[Ask, Any, str]:
        """The run as what it asks for: ('update',), ('evaluate', iters), which is answered with the loss, ('save',), and at each of
        `rungs`, once it is evaluated, ('rung', iteration), which is answered with 'go', 'pause', 'prune', or 'stop'.

        Whoever goes through it does that, for this run alone or for many together. Ends with 'done', 'diverged' or 'pruned';
        raises Stopped after saving where it is, and is asked at the same rung again then, unless it was told to go on.
        """
        train, total, state = self.config.train, self.config.iterations, self.state
        every = train.checkpoint_interval or train.eval_interval
        self.model.train()
        for due in self.iterations(total, rungs):
            if due:
                yield ("update",)
            stopping, rung = stop(), self.at_rung(rungs)
            bad = self.tell(tracker, due, stopping or rung)
            if bad is not None:
                state.iter, state.val_loss = bad, None
                tracker.log({"kind": "train", **self.position(), "train_loss": None})
                return "diverged"
            looking = rung or state.iter % train.eval_interval == 0 or state.iter == total
            if looking and state.evaluated < state.iter:
                loss = yield ("evaluate", (state.iter == total and train.final_eval_iters) or train.eval_iters)
                if not self.note(tracker, loss):
                    return "diverged"
                say(state, True)
            elif due and state.iter % train.log_interval == 0:
                say(state, False)
            if state.iter == total:
                break
            told = "stop" if stopping else (yield ("rung", state.iter)) if rung else "go"
            state.judged = state.iter if rung and told == "go" else state.judged
            if state.iter > 0 and (told != "go" or state.iter % every == 0):
                yield ("save",)
            if told == "prune":
                return "pruned"
            if told != "go":
                raise Paused(state.iter) if told == "pause" else Stopped
        yield ("save",)
        return "done"

    def iterations(self, total: int, rungs: Collection[int]) -> Iterator[bool]:
        """One False for what is due before the first update, then True until `total` updates are done."""
        if self.state.evaluated < 0 or self.at_rung(rungs):
            yield False
        while self.state.iter < total:
            yield True

    def at_rung(self, rungs: Collection[int]) -> bool:
        """Whether the run stands at a rung and was not told there to go on."""
        return self.state.iter in rungs and self.state.judged < self.state.iter

    def tell(self, tracker: Tracker, updated: bool, looking: bool) -> int | None:
        """Logs the training loss where it is due; the iteration of a loss that is not finite, if there was one. `looking`: losses
        are read from the device also where none is due."""
        train, state, started = self.config.train, self.state, time.perf_counter()
        logging = updated and state.iter % train.log_interval == 0
        looking = looking or self.looks()
        bad = self.flush() if looking or self.device.type == "cpu" else None
        if looking:
            synchronise(self.device)
        self.count("update", time.perf_counter() - started)
        if bad is None and logging:
            record = {"kind": "train", **self.position(), "train_loss": sum(state.pending) / len(state.pending)}
            record["learning_rate"] = self.config.optimizer.options.learning_rate * self.schedule.multiplier(
                state.iter - 1
            )
            record["grad_norm"] = None if self.grad_norm is None else float(self.grad_norm)
            record["tokens_per_second"] = self.tokens_per_second()
            found = self.ranks.means(self.plain.statistics())
            tracker.log({**record, **({"modules": found} if found else {})})
            state.pending = []
        if bad is None and self.telemetry is not None:
            tracker.log({"kind": "slices", **self.position(), "slices": self.told_slices(self.telemetry)})
            self.telemetry = None
        return bad

    def looks(self) -> bool:
        """Whether losses are read from the device at this iteration."""
        train, i = self.config.train, self.state.iter
        every = (train.log_interval, train.eval_interval, train.checkpoint_interval)
        return i in (0, self.config.iterations) or any(n and i % n == 0 for n in every)

    def told_slices(self, measured: Tensor) -> dict[str, dict[str, float]]:
        """By address, what `watch` measured."""
        names = ("weight_norm", "grad_norm", "update_ratio")
        each = zip(self.optimizers.trained, *measured.tolist(), strict=True)
        return {row.slice.address: dict(zip(names, values, strict=True)) for row, *values in each}

    def note(self, tracker: Tracker, loss: float) -> bool:
        """Logs an evaluation; False where the loss is not finite."""
        state = self.state
        state.evaluated = state.iter
        tracker.log({"kind": "eval", **self.position(), "val_loss": loss})
        if not math.isfinite(loss):
            state.val_loss = None
            return False
        state.val_loss = loss
        state.best_val_loss = loss if state.best_val_loss is None else min(loss, state.best_val_loss)
        return True

    def position(self) -> dict[str, Any]:
        return {
            "iter": self.state.iter,
            "tokens": self.state.iter * self.config.tokens_per_iter,
            "seconds": round(self.state.seconds, 4),
        }

    def vitals(self) -> dict[str, Any]:
        """What a heartbeat says of the run."""
        return {"iter": self.state.iter, "device": str(self.device), "peak_memory_bytes": peak_memory(self.device)}

    def tokens_per_second(self) -> float:
        """Training tokens per second of updates, evaluations not counted."""
        return self.state.iter * self.config.tokens_per_iter / max(self.state.train_seconds, 1e-9)

    def result(self) -> dict[str, Any]:
        """What the run measured, for result.json."""
        state = self.state
        return {
            "val_loss": state.val_loss,
            "best_val_loss": state.best_val_loss,
            "train_loss": state.train_loss,
            "iters": state.iter,
            "tokens": state.iter * self.config.tokens_per_iter,
            "seconds": round(state.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second(), 2),
            "parameters": sum(row.slice.numel for row in self.rows),
            "trainable_parameters": sum(row.slice.numel for row in self.optimizers.trained),
            "flops_per_token": self.plain.flops_per_token(),
            "peak_memory_bytes": peak_memory(self.device),
        }
