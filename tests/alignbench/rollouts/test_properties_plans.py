"""Whatever a plan is, its costs are exact, and the rollout makes of it the forest that it says."""

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from alignbench import Plan, RolloutForest, Sampler, Step, load_sampler, registry, rollout
from alignbench.rollouts.executor import predict
from alignbench.rollouts.noise import group_keys
from alignbench.rollouts.plan import Side
from alignbench.rollouts.terms import EdgeRows, edge_terms
from tests.support.toys import ToyBackbone

GROUP = 16
"""Leaves of a group, at most."""
LEVELS = st.floats(0.2, 1.0)
PROMPTS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)

# float32: other batch sizes round differently; densities are means over 18 dimensions of squares of size 1.
ROUNDING = 1e-5

Branch = tuple[int, ...]
"""The root's number, then the child's number at each step."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any steps; cps leaves no density at the last one."""
    count = draw(st.integers(1, 5))
    steps = []
    for t in range(count):
        rule = draw(st.sampled_from(["ode", "sde", "dance", *(["cps"] if t < count - 1 else [])]))
        stride = draw(st.integers(1, 2))
        if rule == "ode":
            steps.append(Step(stride=stride))
        else:
            children, scored = draw(st.integers(1, 3)), draw(st.booleans())
            steps.append(Step(rule, draw(LEVELS), children, stride, scored))  # type: ignore[arg-type]
    plan = Plan(tuple(steps), draw(st.integers(1, 3)))
    assume(plan.leaves <= GROUP)
    return plan


@st.composite
def sided_plans(draw: st.DrawFn) -> Plan:
    """A deterministic trunk, and side branches with a scored step of any kind that are finished in one or two ways."""
    length = draw(st.integers(2, 5))

    def finish(left: int) -> tuple[Step, ...]:
        steps: list[Step] = []
        while left:
            stride = draw(st.integers(1, left))
            noisy = stride < left and draw(st.booleans())
            steps.append(Step("sde", 0.5, draw(st.integers(1, 2)), stride, scored=False) if noisy else Step(stride=stride))
            left -= stride
        return tuple(steps)

    sides = []
    for at in draw(st.lists(st.integers(0, length - 2), min_size=1, max_size=3)):
        rule: Any = draw(st.sampled_from(["sde", "dance", "cps"]))
        first, left = Step(rule, draw(LEVELS), draw(st.integers(1, 3))), length - at - 1
        also = tuple(Side(1, finish(left)) for _ in range(draw(st.integers(0, 1))))
        sides.append(Side(at, (first, *finish(left)), also))
    return Plan((Step(),) * max(side.at for side in sides), draw(st.integers(1, 2)), tuple(sides))


@st.composite
def samplers(draw: st.DrawFn) -> tuple[Sampler, dict[str, Any]]:
    """Any sampler that ships with settings that fit together, and these settings."""
    name = draw(st.sampled_from(registry.names("samplers")))
    steps, levels = draw(st.integers(5, 9)), draw(st.integers(1, 2))
    inside = st.integers(1, steps - 2)
    wanted: dict[str, st.SearchStrategy[Any]] = {
        "steps": st.just(steps),
        "levels": st.just(levels),
        "group_size": st.integers(2, 6),
        "children": st.integers(2, 3),
        "rule": st.sampled_from(["sde", "cps", "dance"]),
        "eta": LEVELS,
        "stochastic_share": st.floats(0.01, 1.0),
        "window": st.integers(1, steps - 1),
        "passes": st.integers(1, 3),
        "order": st.sampled_from(["progressive", "random"]),
        "compress": st.floats(0.01, 1.0),
        "splits": st.lists(inside, min_size=levels, max_size=levels, unique=True),
        "early": st.lists(st.floats(-2, 12), min_size=levels, max_size=levels),
        "late": st.lists(st.floats(-2, 12), min_size=levels, max_size=levels),
        "kappa": st.none() | st.floats(0, 50),
        "min_gap": st.integers(1, 2),
        "ratio": st.floats(0.01, 1.0),
        "depth_pruning": st.integers(0, 2),
        "pruning_stop": st.integers(0, 2),
        "split_noise_level": st.none() | LEVELS,
        "first_split": st.just(1),
    }
    fields = registry.find("samplers", name, Sampler).Settings.model_fields
    settings = {key: draw(strategy) for key, strategy in wanted.items() if key in fields}
    return load_sampler(name, **settings), settings


def branches(plan: Plan) -> list[list[Branch]]:
    """The live branches of a group before each step, and the leaves; counted one by one."""
    live: list[list[Branch]] = [[(root,) for root in range(plan.roots)]]
    for step in plan.steps:
        live.append([(*branch, child) for branch in live[-1] for child in range(step.children)])
    return live


def is_line(plan: Plan) -> bool:
    return not plan.sides


def scored(plan: Plan) -> list[int]:
    return [t for t, step in enumerate(plan.steps) if step.rule != "ode" and step.scored]


@given(plans(), st.integers(1, 4))
def test_costs_are_those_of_branches_counted_one_by_one(plan: Plan, groups: int) -> None:
    live = branches(plan)
    assert plan.leaves == len(live[-1])
    assert plan.model_rows(groups) == groups * sum(map(len, live[:-1]))
    assert plan.replay_rows(groups) == groups * sum(len(live[t]) for t in scored(plan))
    assert [plan.branches_before(t) for t in range(len(live))] == list(map(len, live))
    assert plan.schedule_indices == (0, *accumulate(step.stride for step in plan.steps))
    alone = plan.as_independent()
    assert (alone.leaves, alone.splits, alone.schedule_indices) == (plan.leaves, (), plan.schedule_indices)
    assert alone.model_rows() >= plan.model_rows()


@given(samplers(), st.floats(0, 1), st.integers(0, 2**31))
def test_every_samplers_plan_ends_at_the_picture_with_the_leaves_it_was_asked_for(
    made: tuple[Sampler, dict[str, Any]], progress: float, seed: int
) -> None:
    sampler, settings = made
    plan = sampler.plan(progress, np.random.default_rng(seed))
    assert plan == sampler.plan(progress, np.random.default_rng(seed))
    assert plan.schedule_indices[-1] == settings["steps"]
    assert not any(plan.moves[point - 1].step.stochastic for point, _ in plan.ends)
    assert plan.stochastic_steps
    if plan.sides:
        return  # hand-computed in tests/samplers
    tree = settings.get("children", 0) ** settings.get("levels", 0)
    assert plan.leaves == settings.get("group_size", tree) == len(branches(plan)[-1])
    assert len(plan.splits) == (0 if "group_size" in settings else settings["levels"])
    assert all(1 <= t <= settings["steps"] - 2 for t in plan.splits)
    assert all(later - t >= settings.get("min_gap", 1) for t, later in pairwise(plan.splits))


@given(plans() | samplers().map(lambda made: made[0].plan(0.5, np.random.default_rng(0))).filter(is_line), PROMPTS, st.data())
def test_the_forest_has_the_plans_branches_in_order(plan: Plan, prompts: list[str], data: st.DataObject) -> None:
    toy, groups, live = ToyBackbone(), len(prompts), branches(plan)
    forest = rollout(toy, prompts, plan, seed=data.draw(st.integers(0, 99)))
    assert (toy.calls, toy.rows) == (len(plan.steps), groups * sum(map(len, live[:-1])))
    rows: list[tuple[int, int, Branch]] = []
    edges: list[tuple[int, Branch]] = []  # row of the parent, branch of the child
    of_child: dict[tuple[int, Branch], int] = {}
    for t in scored(plan):
        for g in range(groups):
            for parent in live[t]:
                for child in range(plan.steps[t].children):
                    of_child[g, (*parent, child)] = len(edges)
                    edges.append((len(rows), (*parent, child)))
                rows.append((g, t, parent))
    assert list(zip(forest.row_group.tolist(), forest.row_step.tolist(), strict=True)) == [(g, t) for g, t, _ in rows]
    assert forest.edge_row.tolist() == [row for row, _ in edges]
    assert forest.leaf_edges.tolist() == [
        [of_child[g, leaf[: t + 2]] for t in scored(plan)] for g in range(groups) for leaf in live[-1]
    ]
    sigmas = toy.sigmas(sum(step.stride for step in plan.steps))
    for name, stops in (("edge_sigma", plan.schedule_indices), ("edge_sigma_next", plan.schedule_indices[1:])):
        assert getattr(forest, name).tolist() == [float(sigmas[stops[rows[row][1]]]) for row, _ in edges]
    assert torch.equal(forest.edge_sigma, forest.row_sigma[forest.edge_row])
    # The child of one edge is the parent of the next where no other step is between them.
    for earlier, later in zip(scored(plan), scored(plan)[1:], strict=False):
        if later == earlier + 1:
            place = scored(plan).index(earlier)
            reached = forest.edge_child[forest.leaf_edges[:, place]]
            assert torch.equal(reached, forest.rows[forest.edge_row[forest.leaf_edges[:, place + 1]]])


State = tuple[tuple[int, int], ...]
"""The root, then for each step its line and the number of the child."""


def walk(plan: Plan) -> tuple[dict[State, int], set[State], list[tuple[int, State]], list[int]]:
    """Follows every branch of a plan with sides by itself.

    Returns:
        The place in the schedule of each state that is evaluated, the parents of scored steps, each image with its group, and
        the number of scored steps on the way to each.
    """
    end = sum(step.stride for step in plan.steps) + max(
        (sum(s.stride for s in side.steps) - sum(s.stride for s in plan.steps[side.at :]) for side in plan.sides), default=0
    )
    places: dict[State, int] = {}
    parents: set[State] = set()
    images: list[tuple[int, State]] = []
    lengths: list[int] = []
    lines = iter(range(1000))

    def follow(line: Any, group: int, live: list[tuple[State, int, int]]) -> None:
        number, stops = next(lines), [live]
        for step in line.steps:
            places.update({state: place for state, place, _ in live})
            counts = step.rule != "ode" and step.scored
            parents.update(state for state, _, _ in live if counts)
            live = [
                ((*state, (number, child)), place + step.stride, length + counts)
                for state, place, length in live
                for child in range(step.children)
            ]
            stops.append(live)
        for side in line.sides:
            follow(side, side.group, stops[side.at])
        done = [(state, length) for state, place, length in live if place == end]
        images.extend((group, state) for state, _ in done)
        lengths.extend(length for _, length in done)

    follow(plan, 0, [(((-1, root),), 0, 0) for root in range(plan.roots)])
    return places, parents, images, lengths


@given(sided_plans(), PROMPTS, st.integers(0, 99))
def test_costs_of_side_branches_are_those_of_branches_followed_one_by_one(plan: Plan, prompts: list[str], seed: int) -> None:
    places, parents, images, lengths = walk(plan)
    assert plan.leaves == len(images)
    assert plan.model_rows() == len(places)
    assert plan.replay_rows() == len(parents)
    assert set(lengths) == {plan.path_length}
    assert plan.schedule_indices[:-1] == tuple(sorted(set(places.values())))
    toy = ToyBackbone()
    forest = rollout(toy, prompts, plan, seed=seed)
    assert (toy.calls, toy.rows) == (len(set(places.values())), len(prompts) * len(places))
    assert len(forest.rows) == len(prompts) * len(parents)
    assert len(forest.leaves) == len(prompts) * len(images)
    # Each edge starts at its parent's own sigma, and is drawn by the rule and the noise of its class.
    found = {(plan.moves[m].step.eta, float(sigma)) for m, sigma in zip(forest.edge_step, forest.edge_sigma, strict=True)}
    sigmas = toy.sigmas(plan.schedule_indices[-1])
    assert found == {(side.steps[0].eta, float(sigmas[side.at])) for side in plan.sides}
    assert torch.equal(forest.edge_eta, torch.tensor([plan.moves[m].step.eta for m in forest.edge_step]))


@given(plans(), PROMPTS, st.data())
def test_sums_means_and_descendants_are_those_of_plain_loops(plan: Plan, prompts: list[str], data: st.DataObject) -> None:
    assume(scored(plan))
    forest = rollout(ToyBackbone(), prompts, plan, seed=0)
    whole = st.integers(-64, 64).map(float)  # sums of these are exact
    of_edges = data.draw(st.lists(whole, min_size=len(forest.old_log_prob), max_size=len(forest.old_log_prob)))
    of_leaves = data.draw(st.lists(whole | st.just(float("nan")), min_size=len(forest.leaves), max_size=len(forest.leaves)))
    paths, k = forest.leaf_edges.tolist(), forest.group_size
    sums = [sum(of_edges[edge] for edge in path) for path in paths]
    assert forest.path_sum(torch.tensor(of_edges)).tolist() == [sums[i : i + k] for i in range(0, len(sums), k)]
    means = torch.tensor([[s / len(paths[0]) for s in sums[i : i + k]] for i in range(0, len(sums), k)])
    torch.testing.assert_close(forest.path_mean(torch.tensor(of_edges)), means)
    below = [[of_leaves[i] for i, path in enumerate(paths) if edge in path] for edge in range(len(of_edges))]
    known = [[value for value in values if value == value] for values in below]
    expected = torch.tensor([sum(values) / len(values) if values else float("nan") for values in known])
    torch.testing.assert_close(forest.descendant_mean(torch.tensor(of_leaves)).float(), expected, equal_nan=True)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths))))
    forest.train_only(chosen)
    assert forest.trained is not None
    trained = {int(forest.edge_row[edge]) for i, path in enumerate(paths) if chosen[i] for edge in path}
    assert set(forest.trained.nonzero()[:, 0].tolist()) == trained


@given(plans() | sided_plans(), st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=4), st.data())
def test_parts_of_a_rollout_join_to_the_whole_wherever_it_is_cut(plan: Plan, prompts: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(prompts) - 1))))
    toy, keys = ToyBackbone(), group_keys(prompts)
    whole = rollout(toy, prompts, plan, seed=3, iteration=7)
    bounds = list(zip([0, *cuts], [*cuts, len(prompts)], strict=True))
    joined = RolloutForest.joined([rollout(toy, prompts[a:b], plan, seed=3, iteration=7, keys=keys[a:b]) for a, b in bounds])
    assert (joined.prompts, joined.leaf_prompts) == (prompts, whole.leaf_prompts)
    assert torch.allclose(joined.leaf_latents, whole.leaf_latents, atol=ROUNDING)
    assert bool((joined.edge_row.diff() >= 0).all())
    for name in ("edge_sigma", "edge_sigma_next", "edge_eta", "edge_group", "edge_step", "old_log_prob"):
        ours, theirs = (getattr(forest, name)[forest.leaf_edges] for forest in (joined, whole))
        assert torch.allclose(ours.float(), theirs.float(), atol=ROUNDING), name
    for forest in (joined, whole):
        parents, children = forest.states[forest.rows[forest.edge_row]], forest.states[forest.edge_child]
        forest.rewards = (children - parents)[forest.leaf_edges].flatten(1).sum(1)
    # Sums over 18 dimensions and some steps.
    assert torch.allclose(joined.rewards, whole.rewards, atol=100 * ROUNDING)


@given(plans() | sided_plans(), PROMPTS, st.sampled_from(["mean", "sum"]), st.data())
def test_replayed_under_the_same_policy_every_importance_ratio_is_one(
    plan: Plan, prompts: list[str], reduction: Any, data: st.DataObject
) -> None:
    assume(plan.stochastic_steps)
    toy = ToyBackbone()
    toy.nudge(data.draw(st.floats(0, 0.3)))
    forest = rollout(toy, prompts, plan, seed=1, reduction=reduction, micro_batch=data.draw(st.integers(1, 9)))
    rows, conditioning = EdgeRows.of(forest), toy.encode(forest.prompts)
    cut = data.draw(st.integers(0, len(rows)))
    parts = [part for part in (rows.part(0, cut), rows.part(cut, len(rows))) if len(part)]
    found = [edge_terms(part, predict(toy, part.x, part.sigma, conditioning, part.group)) for part in parts]
    terms = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    largest = 18 * ROUNDING if reduction == "sum" else ROUNDING
    assert (torch.exp(terms["log_prob"] - forest.old_log_prob) - 1).abs().max() < largest
    assert terms["drift_noise"].abs().max() < largest
