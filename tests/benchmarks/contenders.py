"""What the batched executor and the engine are compared with: the same work as public tree code does it, and the model's
part of it alone."""

from collections.abc import Sequence

import torch

from alignbench import RolloutForest, flow, rollout
from alignbench.backbone import Backbone
from alignbench.rollouts.executor import predict
from alignbench.rollouts.plan import Plan


@torch.no_grad()
def rollout_per_branch(policy: Backbone, prompts: Sequence[str], plan: Plan) -> int:
    """A loop over prompts, steps and live branches, batch size one; returns the number of model calls."""
    sigmas, calls = policy.sigmas(plan.schedule_indices[-1])[list(plan.schedule_indices)], 0
    for prompt in prompts:
        conditioning, group = policy.encode([prompt]), torch.zeros(1, dtype=torch.long)
        branches = [torch.randn(1, *policy.latent_shape) for _ in range(plan.roots)]
        for t, step in enumerate(plan.steps):
            sigma, sigma_next = float(sigmas[t]), float(sigmas[t + 1])
            grown = []
            for x in branches:
                velocity = policy.velocity(x, sigmas[t : t + 1], conditioning, group)
                calls += 1
                for _ in range(step.children):
                    grown.append(flow.step(x, velocity, sigma, sigma_next, step.eta, step.rule).x_next)
            branches = grown
    return calls


def training_per_leaf(policy: Backbone, forest: RolloutForest) -> int:
    """Evaluates every stochastic step of every leaf, shared ancestors again and again; returns the number of rows."""
    edges = forest.leaf_edges.flatten()
    rows = forest.edge_row[edges]
    x, sigma = forest.states[forest.rows[rows]], forest.edge_sigma[edges]
    velocity = predict(policy, x, sigma, policy.encode(forest.prompts), forest.row_group[rows])
    mean, std = flow.moments(x, velocity, sigma, forest.edge_sigma_next[edges], forest.edge_eta[edges], "cps")
    log_prob = flow.log_prob(forest.states[forest.edge_child[edges]], mean, std)
    advantage = torch.linspace(-1, 1, len(forest.leaves)).repeat_interleave(forest.leaf_edges.shape[1])
    (-(advantage * torch.exp(log_prob - log_prob.detach())).mean()).backward()
    return len(rows)


def model_of_training(policy: Backbone, forest: RolloutForest) -> int:
    """One pass forward and back over the distinct parents and nothing else; returns the number of rows."""
    x, conditioning = forest.states[forest.rows], policy.encode(forest.prompts)
    velocity = predict(policy, x, forest.row_sigma, conditioning, forest.row_group)
    velocity.backward(torch.ones_like(velocity) / velocity.numel())
    return len(x)


def iteration_step_by_step(policy: Backbone, prompts: Sequence[str], plan: Plan) -> None:
    """An iteration of a plain Flow-GRPO loop: images without shared steps in one batch, then a pass over it for each step."""
    alone = plan.as_independent()
    forest = rollout(policy, prompts, alone, seed=0)
    advantage = torch.linspace(-1, 1, len(forest.leaves))
    conditioning = policy.encode(forest.prompts)
    for t in alone.stochastic_steps:
        edges = (forest.edge_step == t).nonzero()[:, 0]
        rows = forest.edge_row[edges]
        x, sigma = forest.states[forest.rows[rows]], forest.edge_sigma[edges]
        velocity = policy.velocity(x, sigma, conditioning, forest.row_group[rows])
        rule = alone.steps[t].rule
        mean, std = flow.moments(x, velocity, sigma, forest.edge_sigma_next[edges], forest.edge_eta[edges], rule)
        log_prob = flow.log_prob(forest.states[forest.edge_child[edges]], mean, std)
        ratio = torch.exp(log_prob - forest.old_log_prob[edges])
        (-(advantage * ratio).mean() / len(alone.stochastic_steps)).backward()
