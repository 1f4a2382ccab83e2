"""A run: judge the base model, train it with one (objective, sampler) pair, judge it again, write the record.

One iteration:

    prompts -> sampler.plan -> rollout -> decode -> scorer -> forest.rewards -> engine.backward -> optimizer step
"""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from torch import Tensor

from alignbench import engine, groups, plots
from alignbench.backbone import Backbone
from alignbench.checkpoint import EMA, Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from alignbench.config import RunConfig
from alignbench.console import Console, Silent
from alignbench.errors import NonFiniteError, RunError, UserError
from alignbench.evaluation import Evaluation, Judges, alarms, check_scores_vary, compare, evaluate, evaluation_prompts
from alignbench.executor import rollout
from alignbench.forest import RolloutForest
from alignbench.load import load_backbone, load_objective, load_sampler
from alignbench.noise import seed_of
from alignbench.record import Budget, Protocol, Result, RunInfo, environment, now, write_atomically
from alignbench.scorer import checked_scores
from alignbench.tasks import Task, load_task

RATIO_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""How far the importance ratio may be from 1 on the first update after a rollout."""


def run(config: RunConfig, out: Path, *, console: Console | None = None, resume: bool = False) -> Result:
    """Trains and evaluates one pair; everything lands in the folder `out`.

    Args:
        out: a new or empty folder; with `resume`, the folder of an interrupted run.

    Raises:
        UserError: the configuration is wrong or the folder is taken; nothing has been written.
        RunError: the run failed; what was measured until then is in the folder.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    return _Run(config, out, console or Silent(), resume).run()


class _Run:
    def __init__(self, config: RunConfig, out: Path, console: Console, resume: bool) -> None:
        self.config, self.out, self.console, self.resume = config, out, console, resume
        if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already; choose another --out, or continue it with --resume {out}")
        self.threads = config.threads or min(8, len(os.sched_getaffinity(0)))
        torch.set_num_threads(self.threads)
        self.task: Task = load_task(config.task)
        self.objective = load_objective(config.objective.name, **config.objective.settings)
        self.sampler = load_sampler(config.sampler.name, **config.sampler.settings)
        self.sampler.plan(0.0, np.random.default_rng(0))  # an impossible plan is refused before anything is loaded
        evaluation_prompts(self.task, config.evaluation)  # likewise
        console.status("loading models")
        torch.manual_seed(config.seed)  # of a new adapter's weights
        self.policy: Backbone = load_backbone(
            config.backbone.name, **{"device": config.device, "guidance": config.guidance, **config.backbone.settings}
        )
        self.judges = Judges(self.task)
        self.parameters = [*self.policy.parameters(), *self.objective.parameters()]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.ema = EMA(list(self.policy.parameters()), config.ema.decay, config.ema.every) if config.ema else None
        self.budget = Budget()
        self.metrics: list[dict[str, Any]] = []
        self.iteration = 0
        self.ratio_deviation = 0.0
        self.started = now()
        self.status = "complete"
        self.phases: dict[str, float] = dict.fromkeys(("rollout", "decode", "score", "train"), 0.0)

    # ------------------------------------------------------------------------------------------------ whole run

    def run(self) -> Result:
        if self.resume and has_checkpoint(self.out / "checkpoints"):
            self._restore()
        self.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.resolved(), sort_keys=False, allow_unicode=True)
        write_atomically(self.out / "config.yaml", lambda p: p.write_text(text, encoding="utf-8"))
        self.console.begin(self.config, self.policy, self.sampler.plan(0.0, np.random.default_rng(0)), self.threads)
        with self._on_base_weights():
            base = self._evaluate("base model")
        check_scores_vary(self.judges, base)
        self._write_evaluation({"base": base})
        try:
            self._train()
        except KeyboardInterrupt:
            self.status = "interrupted"
            self._save()
            self._write_metrics()
            raise
        except (RunError, UserError):
            self._write_metrics()
            raise
        self._save()
        with self._on_averaged_weights():
            final = self._evaluate("trained model") if self.iteration else base
            self._write_evaluation({"base": base, "final": final})
            result = self._result(base, final)
            if self.config.pictures:
                self._write_pictures(base, final)
        content = result.model_dump_json(indent=2) + "\n"
        write_atomically(self.out / "result.json", lambda p: p.write_text(content, encoding="utf-8"))
        self._write_metrics()
        if self.config.pictures:
            plots.plot_run(self.out)
        self.console.end(result, self.out)
        return result

    def _evaluate(self, what: str) -> Evaluation:
        began = time.perf_counter()
        with self.console.activity(what) as advance:
            found = evaluate(
                self.policy,
                self.task,
                self.judges,
                self.config.evaluation,
                micro_batch=self._eval_batch(),
                advance=advance,
            )
        self.budget.seconds_evaluation += time.perf_counter() - began
        return found

    def _eval_batch(self) -> int:
        return self.config.micro_batch or 64

    @contextmanager
    def _on_base_weights(self) -> Iterator[None]:
        with self.policy.reference():
            yield

    @contextmanager
    def _on_averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    # ------------------------------------------------------------------------------------------------ training

    def _train(self) -> None:
        config = self.config
        if not self.objective.needs.training:
            return
        with self.console.training(config.iterations, self.iteration) as report:
            while self.iteration < config.iterations:
                if self._budget_spent():
                    self.status = "budget spent"
                    return
                row = self._iterate()
                report(row)
                if self.iteration % config.checkpoint_every == 0 and self.iteration < config.iterations:
                    self._save()
                    self._write_metrics()

    def _iterate(self) -> dict[str, Any]:
        """One whole iteration, or none: an interrupt comes before any weight has changed, or after all is booked."""
        config, i = self.config, self.iteration
        budget, phases = self.budget.model_copy(), dict(self.phases)
        began = time.perf_counter()
        try:
            progress = i / max(config.iterations - 1, 1)
            plan = self.sampler.plan(progress, np.random.default_rng([config.seed, 1, i]))
            prompts = self._prompts(i)
            with self._phase("rollout"):
                forest = rollout(
                    self.policy,
                    prompts,
                    plan,
                    config.seed,
                    i,
                    reduction=config.log_prob_reduction,
                    micro_batch=config.micro_batch,
                    progress=progress,
                )
            self.budget.model_rows_rollout += plan.model_rows(len(prompts))
            scores = self._score(forest)
        except BaseException:
            self.budget, self.phases = budget, phases
            raise
        with deferred_interrupt():
            splits = ",".join(map(str, plan.splits))
            row: dict[str, Any] = {"iteration": i, "splits": splits, **self._reward_numbers(forest, scores)}
            with self._phase("train"):
                row |= self._updates(forest)
            seconds = time.perf_counter() - began
            self.budget.seconds += seconds
            self.budget.peak_memory_bytes = max(self.budget.peak_memory_bytes, _peak_memory(self.policy.device))
            row |= {
                "seconds": seconds,
                "model_rows_rollout": self.budget.model_rows_rollout,
                "model_rows_train": self.budget.model_rows_train,
                "model_rows": self.budget.model_rows_rollout + self.budget.model_rows_train,
                "reward_calls": self.budget.reward_calls,
            }
            self.metrics.append(row)
            self.iteration += 1
        return row

    def _prompts(self, iteration: int) -> list[str]:
        """The next prompts of an endless series of shuffles; a pure function of the seed and the iteration."""
        count, available = self.config.prompts_per_iteration, self.task.train_prompts
        chosen = []
        for position in range(iteration * count, (iteration + 1) * count):
            epoch, place = divmod(position, len(available))
            order = np.random.default_rng([seed_of("prompts", self.config.seed), epoch]).permutation(len(available))
            chosen.append(available[order[place]])
        return chosen

    def _score(self, forest: RolloutForest) -> dict[str, Tensor]:
        """Raw scores of each reward, [G, K]; fills `forest.rewards` with their weighted sum."""
        with self._phase("decode"):
            images = self.policy.decode(forest.leaf_latents)
        scores: dict[str, Tensor] = {}
        total = torch.zeros(forest.groups, forest.group_size)
        with self._phase("score"):
            for name, (scorer, weight) in self.judges.rewards.items():
                try:
                    answer = scorer.score(images, forest.leaf_prompts)
                except (UserError, RunError):
                    raise
                except Exception as error:
                    raise RunError(
                        f"scorer {name!r} failed in iteration {forest.iteration}: {type(error).__name__}: {error}"
                    ) from error
                raw = forest.by_group(torch.from_numpy(checked_scores(answer, len(images), name)).float())
                scores[name] = raw
                several = len(self.judges.rewards) > 1 and self.config.normalise_rewards
                part = groups.standardise(raw).masked_fill(raw.isnan(), torch.nan) if several else raw
                total = total + weight * part
        self.budget.reward_calls += len(images) * len(scores)
        self.budget.failed_scores += int(sum(raw.isnan().sum() for raw in scores.values()))
        if bool(total.isnan().all()):
            raise RunError(f"no picture of iteration {forest.iteration} could be scored")
        forest.rewards = total.flatten().to(self.policy.device)
        return scores

    def _reward_numbers(self, forest: RolloutForest, scores: dict[str, Tensor]) -> dict[str, float]:
        rewards = forest.by_group(forest.rewards)
        latents = forest.leaf_latents.view(forest.groups, forest.group_size, -1)
        distances = torch.stack([torch.pdist(z.float()).clamp(min=1e-8).log().mean() for z in latents])
        centred = groups.standardise(rewards, std="none")
        return {
            **{f"reward_{name}": float(raw.nanmean()) for name, raw in scores.items()},
            "reward": float(rewards.nanmean()),
            "reward_std_in_group": float(centred.square().mean(1).sqrt().mean()),
            "zero_std_ratio": float((~groups.spread(rewards)).float().mean()),
            "failed_scores": int(rewards.isnan().sum()),
            "rollout_lgmd": float(distances.mean()) - 0.5 * float(np.log(latents.shape[-1])),
        }

    def _updates(self, forest: RolloutForest) -> dict[str, float]:
        numbers: dict[str, float] = {}
        deviation = 0.0
        self.objective.observe(forest)
        for update in range(self.config.updates_per_rollout):
            self.optimizer.zero_grad(set_to_none=True)
            found = engine.backward(self.policy, self.objective, forest, update=update, micro_batch=self.config.micro_batch)
            self.budget.model_rows_train += found.forward_rows
            self.budget.replay_rows += found.rows
            if "log_prob" in found.terms and len(found.terms["log_prob"]):
                deviation = float((torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max())
                if update == 0:
                    self.ratio_deviation = max(self.ratio_deviation, deviation)
            numbers |= self._step() | {"loss": found.loss}
            if update == 0:
                numbers |= {"ratio_abs_dev_first": deviation, **self.objective.diagnostics(found.terms, forest)}
        updates = self.config.updates_per_rollout
        return numbers | {"ratio_abs_dev_max": deviation, "off_policy_share": (updates - 1) / updates}

    def _step(self) -> dict[str, float]:
        o = self.config.optimizer
        done = self.iteration / max(self.config.iterations, 1)
        factor = 0.1 + 0.45 * (1 + np.cos(np.pi * done)) if o.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * float(factor)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient is not finite in iteration {self.iteration} ({self.policy.dtype})")
        before = [p.detach().clone() for p in self.parameters]
        self.optimizer.step()
        self.budget.optimizer_steps += 1
        with torch.no_grad():
            moved = torch.stack([(p - b).square().sum() for p, b in zip(self.parameters, before, strict=True)]).sum().sqrt()
        if self.ema:
            self.ema.update(self.budget.optimizer_steps)
        return {"grad_norm": float(norm), "policy_update_norm": float(moved), "lr": o.lr * float(factor)}

    def _budget_spent(self) -> bool:
        limit, spent = self.config.budget, self.budget
        return (
            (limit.model_rows is not None and spent.model_rows_rollout + spent.model_rows_train >= limit.model_rows)
            or (limit.reward_calls is not None and spent.reward_calls >= limit.reward_calls)
            or (limit.seconds is not None and spent.seconds >= limit.seconds)
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.phases[name] += time.perf_counter() - began

    # ------------------------------------------------------------------------------------------------ files

    def _save(self) -> None:
        self.budget.seconds_by_phase = dict(self.phases)
        save_checkpoint(
            self.out / "checkpoints",
            Checkpoint(
                iteration=self.iteration,
                config=self.config.resolved(),
                budget=self.budget.model_dump(),
                metrics=self.metrics,
                objective=self.objective.state(),
                ratio_deviation=self.ratio_deviation,
                started=self.started,
            ),
            self.policy.trainable(),
            self.optimizer,
            self.ema,
            self.objective,
        )

    def _restore(self) -> None:
        checkpoint = load_checkpoint(
            self.out / "checkpoints",
            self.config.resolved(),
            self.policy.trainable(),
            self.optimizer,
            self.ema,
            self.objective,
        )
        self.iteration, self.metrics = checkpoint.iteration, checkpoint.metrics
        self.budget = Budget.model_validate(checkpoint.budget)
        self.phases |= self.budget.seconds_by_phase
        self.ratio_deviation, self.started = checkpoint.ratio_deviation, checkpoint.started

    def _write_metrics(self) -> None:
        if self.metrics:
            write_atomically(self.out / "metrics.parquet", lambda p: pd.DataFrame(self.metrics).to_parquet(p, index=False))

    def _write_evaluation(self, phases: dict[str, Evaluation]) -> None:
        table = pd.concat([found.table.assign(phase=phase) for phase, found in phases.items()], ignore_index=True)
        write_atomically(self.out / "evals.parquet", lambda p: table.to_parquet(p, index=False))

    def _write_pictures(self, base: Evaluation, final: Evaluation) -> None:
        n = self.config.evaluation.images_per_prompt
        write_atomically(self.out / "samples" / "base.png", _saver(plots.grid(base.images, n)))
        write_atomically(self.out / "samples" / "final.png", _saver(plots.grid(final.images, n)))
        reward = next(iter(self.judges.rewards))
        plots.write_figure(self.out / "samples" / "before_after.png", plots.before_after(base, final, reward, n))
        plan = self.sampler.plan(1.0, np.random.default_rng([self.config.seed, 2]))
        forest = rollout(
            self.policy,
            base.prompts[:1],
            plan,
            self.config.seed,
            self.iteration,
            reduction=self.config.log_prob_reduction,
        )
        scorer, _ = self.judges.rewards[reward]
        images = self.policy.decode(forest.leaf_latents)
        forest.rewards = torch.from_numpy(
            checked_scores(scorer.score(images, forest.leaf_prompts), len(images), reward)
        ).float()
        beta = getattr(self.objective, "beta", None)
        figure = plots.tree(forest, images, reward, float(beta(self.iteration)) if callable(beta) else 2.0)
        plots.write_figure(self.out / "plots" / "tree.png", figure)

    def _result(self, base: Evaluation, final: Evaluation) -> Result:
        config, e = self.config, self.config.evaluation
        metrics = compare(base, final)
        found = alarms(metrics, list(self.judges.rewards))
        tolerance = RATIO_TOLERANCE.get(self.policy.dtype, 1e-5)
        if self.ratio_deviation > tolerance:
            off = f"{self.ratio_deviation:.1e} on a first update (at most {tolerance:.0e} is rounding)"
            found.append(f"the importance ratio was off 1 by {off}")
        self.budget.seconds_by_phase = dict(self.phases)
        return Result(
            run=RunInfo(
                id=self.out.name,
                objective=config.objective.name,
                sampler=config.sampler.name,
                backbone=config.backbone.name,
                task=self.task.name,
                seed=config.seed,
                preset=config.preset,
                started=self.started,
                iterations=self.iteration,
                status=self.status,
            ),
            budget=self.budget,
            metrics=metrics,
            alarms=found,
            checks={"first_update_ratio_abs_dev_max": self.ratio_deviation},
            protocol=Protocol(
                prompts=len(base.prompts),
                images_per_prompt=e.images_per_prompt,
                steps=e.steps or self.policy.default_steps,
                guidance=self.policy.guidance,
                weights="ema" if self.ema else "raw",
                noise_seed=e.seed,
                evals=self.judges.describe(),
            ),
            environment=environment(str(self.policy.device), self.threads),
            config=config.resolved(),
        )


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM until the block is done; raises KeyboardInterrupt then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    former = {s: signal.signal(s, lambda number, frame: pressed.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if pressed:
        raise KeyboardInterrupt


def _saver(image: Image.Image) -> Callable[[Path], Any]:
    return lambda path: image.save(path)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
