"""Bayesian prior-guided optimization (BPGO, arXiv 2511.18919). Against grpo_base.py it adds:

  Setup, Advantage   a prior: the reward that the samples of a prompt are expected to get
  Advantage          reliability-aware scaling (RAS): groups that score above the prior get larger
                     weights, others smaller ones
  Advantage, Update  contrastive reward transformation (CRT): a second surrogate on the same ratio,
                     with advantages from rewards that are stretched around the prior
  Log                the prior, and how far groups are trusted

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A training step samples G images for each of P prompts,
scores them, and raises the probability of those that score above the mean of their group:

    A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps)                   compute_advantages
    rho  = exp(log_prob_new - log_prob_old)                            main, Update; sde.sde_step
    L(A) = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)             loss.clipped_surrogate
    w_i  = 1 + alpha (2 sigmoid(k (mean_j R_ij - prior_i)) - 1)        reliability_weights   eq 2
    Rt   = (lambda (R - prior) + 1[R > prior]) exp(R)                  contrastive_rewards   eq 4
    L    = w_i L(A) + beta L(A of Rt)                       main, Advantage and Update    eq 3, 5, 6
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                   loss.gaussian_kl

The authors' code (TeleBoost, commit d4279ac) has other equations. --variant released takes them:

    Rt   = (a (R - prior) + 1[R > prior]) sigmoid(R / tau) R           released_contrastive_rewards
    w_i  = 1 + alpha (l + (h - l) P(mu_i > prior_i | Rt_i) - 1)        released_reliability_weights
    L    = w_i L(A of Rt) + the KL term                                main, Advantage and Update

a is --crt-slope, tau is --crt-temperature, l and h are --trust-range. P is the posterior
probability that the expected reward of prompt i, mu_i, is above its prior.

Shapes: P prompts a step, G samples a prompt (the group); row = prompt * G + sample, b rows on each
process; n rows of a micro-batch, the last of which may be padding; T denoising steps.

    python bpgo.py               # on GPUs: accelerate launch bpgo.py --model flux
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

import papers
from common import cli, errors, groups, loss, memory, models, sde
from common.args import Above, From
from common.args import Args as SharedArgs
from common.models.family import Family
from common.prompts import (
    caption_of,
    fields_of,
    key_of,
    prompts_ahead,
    prompts_of_step,
    read_prompts,
)
from common.rewards import Rewards
from common.trainer import Checkpoints, Clock, Evaluator, Latents, Log, Policy, Processes

EPS = 1e-8  # added to every standard deviation that rewards are divided by
LARGEST_PRIOR = 1e6  # of --prior-value and --prior field
RUNNING_MEAN_STEPS = 50  # the running mean is exact for so many steps, then exponential


@dataclass
class Args(SharedArgs):
    variant: Literal["printed", "released"] = "printed"
    """Equations of RAS and CRT. printed: those of the paper. released: those of the code that its
    authors released (TeleBoost). A flag described as printed or as released has an effect only with
    that variant."""
    alpha: Annotated[float, From(0, 1)] = 0.5
    """RAS: how far the weights of groups may differ from 1. As printed: at most by alpha. As
    released: alpha times as far as --trust-range does, and the default is 1. 0 gives all groups
    weight 1."""
    prior: Literal["running-mean", "sft", "first-frame", "field", "constant"] = "running-mean"
    """The expected reward of a prompt. running-mean: the mean of all rewards so far. sft: the mean
    reward of the initial model's samples of the prompt. first-frame, for image-to-video models: the
    reward of the prompt's image as a still video. field: the number `prior` in the prompt's line of
    a jsonl file. constant: --prior-value."""
    prior_value: Annotated[float, From(-LARGEST_PRIOR, LARGEST_PRIOR)] = 0.0
    """The expected reward of --prior constant."""
    crt: bool = True
    """Use CRT. --no-crt trains with RAS alone."""
    k: Annotated[float, From(0, 1000)] = 1.0
    """RAS as printed: how steeply the weight rises with (mean reward - prior) / reward scale. At 1
    a group one unit above its prior gets 46% of the largest change. 0 gives all groups weight 1."""
    beta: Annotated[float, From(0, 1000)] = 0.5
    """CRT as printed: weight of the second surrogate. 0 disables it, as --no-crt does."""
    crt_alone: bool = False
    """CRT as printed: train on its surrogate alone (eq 5), without RAS and --beta."""
    lam: Annotated[float, From(0, 1000)] = 1.0
    """CRT as printed: weight of (reward - prior) / reward scale, added to the step of 1 at the
    prior."""
    reward_scale: Annotated[float, From(0, 1e6)] = 0.0
    """As printed: unit of reward - prior in --k and --lam. 0: the typical spread within a group
    that the rewards declare. 1: the equations exactly as in the paper."""
    prior_variance: Annotated[float, Above(0, 1e6)] = 1.0
    """RAS as released: variance of the Normal prior, in squared units of the reward. With a smaller
    variance, more samples are needed to move a weight from the middle of --trust-range."""
    trust_range: Annotated[tuple[float, float], From(0, 10)] = (0.5, 1.5)
    """LOW HIGH. RAS as released, with --alpha 1: the weight of a group that is certainly below its
    prior, and of one that is certainly above it."""
    crt_slope: Annotated[float, From(0, 1e6)] = 50.0
    """CRT as released: weight of (reward - prior), added to the step of 1 at the prior."""
    crt_temperature: Annotated[float, Above(0, 1e6)] = 5.0
    """CRT as released: rewards are multiplied by sigmoid(reward / temperature). Unit: that of the
    reward."""

    SETTINGS = papers.BPGO
    VARIANTS = {"released": papers.BPGO_RELEASED}
    CURVES = ("prior", "trust")
    TITLE = "Bayesian prior-guided optimization (BPGO)"
    ARXIV = ("2511.18919",)


def combine_scores(scores: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Return the weighted sum of the scores: {name: [P, G]}, {name: weight} -> rewards [P, G]."""
    return sum(weight * scores[name] for name, weight in weights.items() if weight)


def compute_advantages(reward: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    """Return the advantages: rewards [P, G] -> [P, G], normalised within each group and clamped.

    The standard deviation is the population one. A group whose rewards are all equal has advantage
    0, exactly, as has a sample without a score (NaN).
    """
    centred = reward - reward.nanmean(1, keepdim=True)
    advantages = centred / (centred.square().nanmean(1, keepdim=True).sqrt() + EPS)
    advantages = torch.where(groups.zero_variance(reward) | reward.isnan(), 0.0, advantages)
    return advantages.clamp(-adv_clip_max, adv_clip_max)


def reliability_weights(
    group_mean: torch.Tensor, prior: torch.Tensor | float, alpha: float, k: float
) -> torch.Tensor:
    """Return the weight of each group, in [1 - alpha, 1 + alpha]: eq 2.

    group_mean [P, 1], prior [P, 1] -> [P, 1]. A group without any score (NaN) has weight 1.
    """
    return (1 + alpha * (2 * torch.sigmoid(k * (group_mean - prior)) - 1)).nan_to_num(1.0)


def released_reliability_weights(
    rewards: torch.Tensor,
    prior: torch.Tensor | float,
    alpha: float,
    prior_variance: float,
    trust_range: tuple[float, float],
) -> torch.Tensor:
    """Return the weight of each group as in the authors' code (TeleBoost, d4279ac).

    rewards [P, G] (contrasted, if CRT is on), prior [P, 1] -> [P, 1], clamped to [0.01, 10]. The
    expected reward of a prompt has the Normal prior N(prior, prior_variance), and its G rewards are
    the evidence. With alpha 1 the weight rises from trust_range[0] to trust_range[1] with the
    probability that the expected reward is above the prior. A group without any score (NaN) has
    weight 1.
    """
    number = rewards.isfinite().sum(1, keepdim=True)  # [P, 1]
    mean = rewards.nanmean(1, keepdim=True)
    variance = (rewards - mean).square().nansum(1, keepdim=True) / (number - 1).clamp(min=1) + 1e-8
    variance = torch.where(number > 1, variance, 1.0)
    precision = number / variance  # of the evidence
    posterior_variance = 1 / (precision + 1 / prior_variance)
    # posterior mean minus prior; computing both and subtracting would lose digits
    shift = posterior_variance * precision * (mean - prior)
    low, high = trust_range
    trust = low + (high - low) * torch.special.ndtr(shift / posterior_variance.sqrt())
    return (1 + alpha * (trust - 1)).clamp(0.01, 10).nan_to_num(1.0)


def contrastive_rewards(
    rewards: torch.Tensor, prior: torch.Tensor | float, lam: float
) -> torch.Tensor:
    """Return rewards stretched around the prior: eq 4.

    rewards [P, G], prior [P, 1] -> [P, G]. The exponent is clamped to [-10, 10].

    main passes rewards - prior, and 0 for the prior: exp(R - prior) is exp(R) times a factor of the
    group, which compute_advantages divides out, and it stays small. The exponent keeps the reward's
    own unit. For rewards more than 1 below the prior the result falls as the reward rises.
    """
    return (lam * (rewards - prior) + (rewards > prior)) * torch.exp(rewards.clamp(-10, 10))


def released_contrastive_rewards(
    rewards: torch.Tensor, prior: torch.Tensor | float, slope: float, temperature: float
) -> torch.Tensor:
    """Return rewards stretched around the prior as in the authors' code (TeleBoost, d4279ac).

    rewards [P, G], prior [P, 1] -> [P, G]. The result is 0 at the prior. It falls as the reward
    rises where the reward is below about half of the prior. If the prior is negative, that includes
    rewards near the prior (docs/methods/bpgo.md).
    """
    gate = torch.sigmoid((rewards / temperature).clamp(-30, 30))
    return (slope * (rewards - prior) + (rewards > prior)) * gate * rewards


# --- Priors: the expected reward of each prompt (section 4.1). `state` is saved and restored. ---


class ConstantPrior:
    """Expects --prior-value of every prompt."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.state = {}

    def expect(self, prompts: list[str], reward: torch.Tensor) -> torch.Tensor:
        """Return the expected reward of P prompts, [P, 1]; reward [P, G]: of their samples."""
        return torch.full_like(reward[:, :1], self.value)


class RunningMeanPrior:
    """Expects the mean of the rewards of the steps before; in the first step, of that step."""

    def __init__(self) -> None:
        self.state = {"mean": 0.0, "steps": 0}

    def expect(self, prompts: list[str], reward: torch.Tensor) -> torch.Tensor:
        """Return the expected reward of P prompts, [P, 1]; then include reward [P, G] in it."""
        mean, steps = self.state["mean"], self.state["steps"]
        if reward.isfinite().any():
            own = reward.nanmean().item()
            self.state["mean"] = mean + (own - mean) / min(steps + 1, RUNNING_MEAN_STEPS)
            self.state["steps"] = steps + 1
            if steps == 0:
                mean = own
        return torch.full_like(reward[:, :1], mean)


class FieldPrior:
    """Expects of each prompt the number in the field `prior` of its line."""

    def __init__(self) -> None:
        self.state = {}

    def expect(self, prompts: list[str], reward: torch.Tensor) -> torch.Tensor:
        """Return the expected reward of P prompts, [P, 1]."""
        return reward.new_tensor([fields_of(prompt)["prior"] for prompt in prompts])[:, None]


class PromptPrior:
    """Expects of each prompt what `measure` gives at the prompt's first visit."""

    def __init__(self, measure: Callable[[list[str]], torch.Tensor]) -> None:
        self.measure = measure  # n prompts -> rewards [n]
        self.state = {"known": {}}

    def expect(self, prompts: list[str], reward: torch.Tensor) -> torch.Tensor:
        """Return the expected reward of P prompts, [P, 1]. Raises RunError if one has no score."""
        known = self.state["known"]
        keys = [key_of(prompt) for prompt in prompts]  # a caption may have several rows
        new = {key: prompt for key, prompt in zip(keys, prompts) if key not in known}
        if new:
            for key, value in zip(new, self.measure(list(new.values())).tolist()):
                if math.isnan(value):
                    raise errors.RunError(
                        f"--prior: {new[key]!r} has no score. Take another prior."
                    )
                known[key] = value
        return reward.new_tensor([known[key] for key in keys])[:, None]


def initial_rewards(
    policy: Policy, evaluator: Evaluator, rewards: Rewards, group_size: int, prompts: list[str]
) -> torch.Tensor:
    """Return the mean reward of the initial model's samples of each of n prompts: [n].

    The samples are noise-free, group_size of each prompt.
    """
    samples = [prompt for prompt in prompts for _ in range(group_size)]
    names = list(rewards.weights)  # not the rewards that are only watched
    scores, _ = evaluator.sample_and_score(samples, names=names, weights=policy.reference)
    return combine_scores(scores, rewards.weights).view(len(prompts), -1).nanmean(1)


def still_rewards(
    model: Family, evaluator: Evaluator, rewards: Rewards, prompts: list[str]
) -> torch.Tensor:
    """Return the reward of each of n prompts' conditioning images, as a still video: [n]."""
    scores = evaluator.score_media(model.still, prompts, names=list(rewards.weights))
    return combine_scores(scores, rewards.weights)


def check_settings(args: Args, prompts: list[str]) -> None:
    """Raise InputError for settings that do not fit together and for prompts without a prior."""
    if args.prior == "field":
        for prompt in prompts:
            value = fields_of(prompt).get("prior")
            if type(value) not in (int, float) or not -LARGEST_PRIOR <= value <= LARGEST_PRIOR:
                raise errors.InputError(
                    f"--prior field: {caption_of(prompt)!r:.80} has no number `prior` from "
                    f"{-LARGEST_PRIOR:g} to {LARGEST_PRIOR:g}. Train on a jsonl file whose lines "
                    'are {"prompt": ..., "prior": NUMBER}.'
                )
    if args.crt_alone and not args.crt:
        raise errors.InputError("--crt-alone: --no-crt leaves nothing to train on. Drop one.")
    if args.trust_range[0] > args.trust_range[1]:
        low, high = args.trust_range
        raise errors.InputError(f"--trust-range {low:g} {high:g}: must rise. Swap the two.")
    if args.variant == "printed":
        return
    if args.crt_alone:
        raise errors.InputError(
            "--crt-alone: only for --variant printed. Give --alpha 0 for CRT without RAS."
        )
    if args.crt and args.aggregate == "advantages":
        raise errors.InputError(
            "--aggregate advantages: CRT of --variant released needs the sum of the rewards. Leave "
            "it out, or add --no-crt."
        )


def make_prior(
    args: Args, policy: Policy, evaluator: Evaluator, rewards: Rewards
) -> ConstantPrior | RunningMeanPrior | FieldPrior | PromptPrior:
    """Return the prior of --prior. Raises InputError for a model without conditioning images."""
    if args.prior == "constant":
        return ConstantPrior(args.prior_value)
    if args.prior == "running-mean":
        return RunningMeanPrior()
    if args.prior == "field":
        return FieldPrior()
    if args.prior == "sft":
        return PromptPrior(partial(initial_rewards, policy, evaluator, rewards, args.group_size))
    if not hasattr(policy.model, "still"):
        raise errors.InputError(
            f"--prior first-frame: {args.model} has no conditioning image. Take another prior."
        )
    return PromptPrior(partial(still_rewards, policy.model, evaluator, rewards))


def main(args: Args) -> Log:
    """Train, and return the log. Raises InputError, RunError or Stopped (common/errors.py)."""
    # --- Setup ---
    cli.check(args)
    processes = Processes(args.process_timeout)
    rows = processes.rows(args.prompts_per_step * args.group_size)  # [b] global row numbers
    checkpoints = Checkpoints(args, processes)  # chooses the run's folder, reads --resume
    prompts = read_prompts(args.prompts)
    check_settings(args, prompts)
    eval_prompts = read_prompts(args.eval_prompts) if args.eval_prompts else []
    all_prompts = prompts + eval_prompts
    rewards = Rewards(args, all_prompts, clips=models.family_of(args.model, args.source).video)
    keep_initial = args.kl_coef > 0 or args.prior == "sft"
    plan = memory.settle(args, processes, rewards.scorers, keep_initial)
    args = plan.args  # --micro-batch auto and what the free memory decides are settled now
    model = models.load(args.model, processes.dtype, all_prompts, **args.model_settings())
    policy = Policy(model, args, processes, plan, keep_initial)
    evaluator = Evaluator(args, model, rewards, eval_prompts, processes, checkpoints)
    evaluator.smoke_test(prompts[0])  # one sample through model and rewards: faults show now
    prior = make_prior(args, policy, evaluator, rewards)
    start = checkpoints.resume(policy, {"prior": prior.state})
    log = Log(args, checkpoints.output, processes, start)
    P, G = args.prompts_per_step, args.group_size
    sigmas = model.sigmas(args.sampling_steps, args.shift)  # [T+1]
    # [b, T+1, ...] float32, filled anew in every step
    latents = Latents(len(rows), len(sigmas), model.noise_shape, processes.device, plan)
    # each of these is one compiled region with --compile
    transition = policy.region(sde.TRANSITIONS[args.sde])
    surrogate = policy.region(loss.clipped_surrogate)
    diagnose = policy.region(loss.diagnostics)

    for step in checkpoints.steps(args.steps):
        metrics = evaluator.run(step, log) if evaluator.due(step) else {}
        clock = Clock(processes.device)

        # --- Rollout ---
        # for choices that are equal on all processes: the window, the trained steps
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        most = args.sde_steps or (args.sampling_steps - 1)  # the last step never has noise
        window = sde.random_window(most, args.sde_window, generator)
        # [T] noise of each step; 0 outside the window, where steps are deterministic
        s = sde.diffusion_coefficients(sigmas, args.noise_level, args.sde, window)
        step_prompts = prompts_of_step(prompts, step, P, args.seed)  # P prompts
        row_prompts = [step_prompts[row // G] for row in rows]  # b prompts
        # encoders that wait on the CPU encode prompts of later steps in the same visit
        ahead = prompts_ahead(prompts, step, P, args.seed, rows // G)
        cond = model.encode(row_prompts, ahead)  # {name: [b, ...]}
        # with --same-noise a group shares the initial noise of its first row
        start_rows = rows // G * G if args.same_noise else rows  # [b]
        scoring = rewards.begin(model.decode, row_prompts, size=evaluator.score_batch)
        log_probs = []
        for mb in processes.batches(len(rows), plan.batch):
            checkpoints.stop_if_asked()  # after a signal: save, and raise Stopped everywhere
            start_noise = sde.RowNoise(args.seed, step, start_rows[mb.index], processes.device)
            # + P * G: other random streams than those of the initial noise
            sde_noise = sde.RowNoise(args.seed, step, P * G + rows[mb.index], processes.device)
            velocity_fn = partial(policy.velocity, cond=models.take(cond, mb.on_device))
            with policy.sampling():  # no gradients
                x = start_noise(model.noise_shape)  # [n, ...]
                _, log_prob = sde.rollout(  # [n, T]
                    velocity_fn, x, sigmas, s, sde_noise, transition, out=latents.part(mb)
                )
            log_probs.append(log_prob)
            # a reward on a server works while others are sampled
            scoring.add(latents.at(mb, -1))
        checkpoints.stop_if_asked()  # the last time in this step: an update is never cut
        # padding rows repeat the last row, so that all passes have one shape; they come last
        log_probs = torch.cat(log_probs)[: len(rows)]  # [b, T]
        metrics["rollout_seconds"] = clock.lap()

        # --- Reward ---
        local_scores = scoring.result()  # {name: [b]}
        scores = {name: processes.gather(x).view(P, G) for name, x in local_scores.items()}
        rewards.check(scores, step_prompts)  # a reward that failed, or a score that is not finite
        metrics["reward_seconds"] = clock.lap()

        # --- Advantage ---
        reward = combine_scores(scores, rewards.weights)  # [P, G]
        expected = prior.expect(step_prompts, reward)  # [P, 1]
        contrasted = reward  # [P, G]
        if args.variant == "released" and args.crt:
            contrasted = released_contrastive_rewards(
                reward, expected, args.crt_slope, args.crt_temperature
            )
        terms = rewards.terms(contrasted, scores)  # [(rewards [P, G], weight)], by --aggregate
        parts = [weight * compute_advantages(r, args.adv_clip_max) for r, weight in terms]
        advantages = sum(parts)  # [P, G]
        if args.variant == "released":
            trust = released_reliability_weights(
                contrasted, expected, args.alpha, args.prior_variance, args.trust_range
            )  # [P, 1]
            contrast = torch.zeros_like(advantages)  # no second surrogate
        else:
            unit = args.reward_scale or rewards.scale
            group_mean = reward.nanmean(1, keepdim=True)  # [P, 1]
            trust = reliability_weights(group_mean, expected, args.alpha, args.k / unit)  # [P, 1]
            # eq 4 of R - prior: a factor common to a group cancels, and exp stays small
            stretched = contrastive_rewards(reward - expected, 0, args.lam / unit)  # [P, G]
            contrast = compute_advantages(stretched, args.adv_clip_max)  # [P, G]
        ras_weight, crt_weight = trust, args.beta  # eq 3 and 6
        if not args.crt:
            crt_weight = 0.0
        if args.crt_alone:  # eq 5
            ras_weight, crt_weight = torch.zeros_like(trust), 1.0
        # a weight >= 0 may multiply the advantages instead of the surrogate
        local_advantages = processes.local(ras_weight * advantages)  # [b]
        local_contrast = processes.local(crt_weight * contrast)  # [b]
        kept = groups.keep_rows(reward, args.best_of, args.min_spread)  # [P, G] bool: trained on
        minibatches = groups.split_rows(kept, args.minibatches)  # a [P, G] mask for each

        # --- Update ---
        diagnostics = []  # [update][pass]
        for update in range(args.updates_per_step * args.minibatches):  # passes x minibatches
            minibatch = minibatches[update % args.minibatches]  # [P, G] bool
            learning = minibatch
            if not args.kl_coef:  # then groups without advantage have no gradient
                learning = minibatch & advantages.any(1, keepdim=True)
            # [b] of the mean over all groups, also those without a gradient; the gradients of all
            # processes are summed
            row_weight = processes.local(groups.row_weights(minibatch) * learning)
            trained_steps = sde.noisy_steps(s, args.timestep_fraction, generator)
            # a model may have two networks, for high and low noise: the last step of each
            last_steps = {model.trained_at(sigmas[t]): t for t in trained_steps}
            # equally many on every process, of equal size; none if no row learns
            micro_batches = processes.micro_batches(learning, plan.batch)
            diagnostics.append([])
            for mb in micro_batches:
                cond_mb = models.take(cond, mb.on_device)
                weight = row_weight[mb.on_device] * mb.real  # [n]: padding rows count nothing
                for t in trained_steps:
                    x, x_next = latents.at(mb, t), latents.at(mb, t + 1)
                    sigma, sigma_next = sigmas[t], sigmas[t + 1]
                    # processes exchange gradients in the last pass of each network
                    last = mb is micro_batches[-1] and t in last_steps.values()
                    with policy.sync_gradients(last):
                        velocity = policy.velocity(x, sigma, cond_mb)
                        # given x_next nothing is drawn: log_prob [n] and mean [n, ...] of it
                        _, log_prob, mean = transition(
                            velocity, x, sigma, sigma_next, s[t], x_next=x_next
                        )
                        log_ratio = log_prob - log_probs[mb.on_device, t]  # [n]
                        ratio = loss.probability_ratio(log_ratio, update)  # [n]
                        row_loss = surrogate(ratio, local_advantages[mb.on_device], args.clip_range)
                        row_loss += surrogate(ratio, local_contrast[mb.on_device], args.clip_range)
                        kl = None  # [n] from the initial weights, if these are kept
                        if args.kl_coef:
                            with policy.reference():  # the initial weights, no gradients
                                velocity_ref = policy.velocity(x, sigma, cond_mb)
                            _, _, mean_ref = transition(velocity_ref, x, sigma, sigma_next, s[t])
                            std = sde.transition_std(sigma, sigma_next, s[t])
                            kl = loss.gaussian_kl(mean, mean_ref, std)
                            row_loss += args.kl_coef * kl
                        loss_share = (weight * row_loss).sum() / len(trained_steps)
                        policy.backward(loss_share)
                    diagnostics[-1].append(
                        diagnose(ratio, log_ratio, args.clip_range, weight, loss_share, update, kl)
                    )
            metrics["grad_norm"] = 0.0  # the last update's is logged
            if micro_batches:
                metrics["grad_norm"] = policy.clip_gradients(args.max_grad_norm)
                if not torch.isfinite(metrics["grad_norm"]):
                    cause = rewards.explain(scores, advantages, step_prompts)
                    raise errors.RunError(f"step {step}: the gradient is not finite. {cause}")
                policy.step()
        metrics["update_seconds"] = clock.lap()

        # --- Log ---
        metrics |= loss.summarise(diagnostics, processes.gather)
        policy.check_ratio(metrics["ratio_error"])  # warns; beyond rounding: RunError
        metrics["grad_rms"] = metrics["grad_norm"] / policy.size**0.5  # per trained weight
        metrics["reward_mean"] = reward.nanmean()
        metrics["reward_std"] = groups.spread(reward).nanmean()
        metrics["advantage_abs_mean"] = advantages.abs().mean()
        metrics["masked_samples"] = reward.isnan().sum()
        metrics["skipped_groups"] = (~kept.any(1)).sum()
        metrics["prior"] = expected.mean()
        metrics["trust_mean"] = trust.mean()
        metrics["trust_min"] = trust.min()
        metrics["trust_max"] = trust.max()
        metrics |= rewards.summary(scores, parts)
        seconds = [metrics[f"{phase}_seconds"] for phase in ("rollout", "reward", "update")]
        metrics["samples_per_second"] = P * G / sum(seconds)
        log.row(step, metrics)

        # --- Checkpoint ---
        checkpoints.finish(step + 1)
        if checkpoints.due():
            checkpoints.save()
        checkpoints.stop_if_asked()

    if evaluator.due(args.steps, last=True):
        log.row(args.steps, evaluator.run(args.steps, log, last=True))
    return log.finish(model, checkpoints.export())


if __name__ == "__main__":
    cli.launch(main, Args, __doc__)
