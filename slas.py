"""Super-linear advantage shaping (SLAS, arXiv 2605.10937). Against grpo_base.py it changes:

  Advantage          deviations are divided by one standard deviation of the whole batch (section 5)
                     and raised to the power 1 + gamma, so large deviations count most
  Setup, Advantage,  --gamma auto: the largest gamma whose update stays within a trust region
  Update             (class TrustRegion, theorem 4)
  Log                gamma, and what the trust region measured

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A training step samples G images for each of P prompts,
scores them, and raises the probability of those that score above the mean of their group:

    z_ij = (R_ij - mean_j R_ij) / (std of all R + eps)                 compute_advantages
    A_ij = sign(z_ij) |z_ij|^(1 + gamma)                               compute_advantages   eq 20
    rho  = exp(log_prob_new - log_prob_old)                            main, Update; sde.sde_step
    L    = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)             loss.clipped_surrogate
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                   loss.gaussian_kl

Shapes: P prompts a step, G samples a prompt (the group); row = prompt * G + sample, b rows on each
process; n rows of a micro-batch, the last of which may be padding; T denoising steps.

    python slas.py               # on GPUs: accelerate launch slas.py --model flux
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

import papers
from common import cli, errors, groups, loss, memory, models, sde
from common.args import Above, From
from common.args import Args as SharedArgs
from common.prompts import prompts_ahead, prompts_of_step, read_prompts
from common.rewards import Rewards
from common.trainer import Checkpoints, Clock, Evaluator, Latents, Log, Policy, Processes

EPS = 1e-8  # added to every standard deviation that rewards are divided by
GAMMAS = [n / 100 for n in range(101)]  # candidates of --gamma auto


@dataclass
class Args(SharedArgs):
    gamma: Annotated[float | Literal["auto"], From(0, 10)] = 0.5
    """Advantages are the deviations to the power 1 + gamma. Larger values give more weight to large
    deviations. 0: GRPO with the batch's standard deviation. auto: the largest gamma up to 1 that
    --kl-limit allows. It needs one more forward pass of a micro-batch per denoising step and
    update."""
    normalize: Literal["before", "after", "shaped", "none"] = "before"
    """How advantages are normalised. before: deviations are divided by the batch's standard
    deviation, then raised to the power. after: the other way round. shaped: the powers are divided
    by their own standard deviation. none: no division."""
    kl_limit: Annotated[float, Above(0, 1e6)] = 4e-5
    """--gamma auto: largest KL divergence of an update, per dimension. The limit holds on average;
    single updates may exceed it. If gamma stays at 0, lower --learning-rate or raise the limit."""

    SETTINGS = papers.SLAS
    CURVES = ("gamma",)
    TITLE = "Super-linear advantage shaping (SLAS)"
    ARXIV = ("2605.10937",)


def combine_scores(scores: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Return the weighted sum of the scores: {name: [P, G]}, {name: weight} -> rewards [P, G]."""
    return sum(weight * scores[name] for name, weight in weights.items() if weight)


def compute_advantages(
    reward: torch.Tensor, gamma: float, adv_clip_max: float, normalize: str = "before"
) -> torch.Tensor:
    """Return the advantages: rewards [P, G] -> [P, G], powers 1 + gamma of the deviations (eq 20).

    The standard deviation is the population one of the whole batch. A group whose rewards are all
    equal has advantage 0, exactly, as has a sample without a score (NaN).
    """
    centred = reward - reward.nanmean(1, keepdim=True)
    std = (reward - reward.nanmean()).square().nanmean().sqrt() + EPS  # of the whole batch
    advantages = centred.sign() * (centred / std).abs() ** (1 + gamma)
    if normalize == "after":
        advantages = advantages * std**gamma
    elif normalize == "shaped":
        shaped_std = (advantages - advantages.nanmean()).square().nanmean().sqrt() + EPS
        advantages = advantages * (1 / shaped_std)
    elif normalize == "none":
        advantages = advantages * std ** (1 + gamma)
    advantages = torch.where(groups.zero_variance(reward) | reward.isnan(), 0.0, advantages)
    return advantages.clamp(-adv_clip_max, adv_clip_max)


def shape_terms(
    terms: list[tuple[torch.Tensor, float]], gamma: float, adv_clip_max: float, normalize: str
) -> list[torch.Tensor]:
    """Return the weighted advantages of each term, whose sum is trained on.

    terms: [(rewards [P, G], weight)] -> [[P, G]].
    """
    return [
        weight * compute_advantages(reward, gamma, adv_clip_max, normalize)
        for reward, weight in terms
    ]


# --- The trust region of --gamma auto ---


def moments_after(
    moments: tuple[int, float, float], power: float, betas: tuple[float, float]
) -> tuple[int, float, float]:
    """Return (k, S, V) after one more update with a gradient of squared size `power`.

    k is the number of updates. S and V are the expected |m|^2 and v of AdamW before its correction
    of the bias, if gradients of different updates are independent. Start with (0, 0.0, 0.0).
    """
    updates, first, second = moments
    beta1, beta2 = betas
    # independent gradients add up by their squares, so the weights of m are squared
    first = beta1**2 * first + (1 - beta1) ** 2 * power
    second = beta2 * second + (1 - beta2) * power
    return updates + 1, first, second


def moments_ratio(moments: tuple[int, float, float], betas: tuple[float, float]) -> float:
    """Return S / V, the expected square of AdamW's step in units of the learning rate.

    Both are corrected for their bias. The ratio is 1 after the first update, and (1 - beta1) /
    (1 + beta1) after many equal ones. It is 0.0 if all gradients were 0.
    """
    updates, first, second = moments
    beta1, beta2 = betas
    if not second:
        return 0.0
    return first / (1 - beta1**updates) ** 2 * (1 - beta2**updates) / second


def largest_gamma(predicted: dict[float, float], limit: float) -> float:
    """Return the largest gamma whose predicted KL is at most `limit`: {gamma: KL} -> gamma.

    Returns 0.0 if none is allowed. Then the limit needs a lower learning rate, not another gamma.

    All candidates are compared, because the allowed ones need not be an interval: deviations below
    1 shrink with gamma, those above 1 grow, and clamped ones stay.
    """
    return max((gamma for gamma, kl in predicted.items() if kl <= limit), default=0.0)


class TrustRegion:
    """Choose gamma by the predicted KL of the next updates (theorem 4, measured).

    AdamW moves the weights by d = -lr m / sqrt(v). The KL between the policies before and after is
    d^T F d / 2, with the Fisher matrix F. If a gradient is sqrt(M) times noise of one distribution,
    with M the mean square of the advantages, then

        KL = kappa S / V,    S = sum_j w_j^2 M_(k-j),    w_j = (1 - b1) b1^j / (1 - b1^k)
                             V = sum_j u_j M_(k-j),      u_j = (1 - b2) b2^j / (1 - b2^k)

    after k updates. kappa depends on the learning rate, curvature, direction and clipping. It is
    measured as (KL of an update) V / S, and averaged exponentially over updates.

    limit: largest KL of an update, per dimension; betas: those of AdamW (b1, b2); memory: the
    fraction of the average that stays at each update.
    """

    def __init__(self, limit: float, betas: tuple[float, float], memory: float = 0.8) -> None:
        self.limit = limit
        self.betas = betas
        self.memory = memory
        self.moments = (0, 0.0, 0.0)  # k, S, V of moments_after
        self.kappa = 0.0  # sum of the weighted measurements
        self.weight = 0.0  # sum of their weights
        self.costs = []  # KL of each update since gamma was chosen
        self.predicted = None  # largest predicted KL of these updates

    def predict(self, power: float, updates: int) -> float:
        """Return the largest KL of the next updates, each with mean square `power`."""
        moments, largest = self.moments, 0.0
        for _ in range(updates):
            moments = moments_after(moments, power, self.betas)
            largest = max(largest, moments_ratio(moments, self.betas))
        return self.kappa / self.weight * largest

    def choose_gamma(self, powers: dict[float, torch.Tensor], updates: int) -> float:
        """Return gamma for the next updates; 0.0 before the first measurement.

        powers: {gamma: mean square of the advantages}; updates: how many updates use this gamma.
        """
        self.costs = []
        if not self.weight:
            return 0.0
        sizes = torch.stack(list(powers.values())).tolist()
        predicted = {gamma: self.predict(size, updates) for gamma, size in zip(powers, sizes)}
        gamma = largest_gamma(predicted, self.limit)
        self.predicted = predicted[gamma]
        return gamma

    def observe(self, power: torch.Tensor, kl: torch.Tensor) -> None:
        """Record an update: the mean square of its advantages, and its measured KL."""
        power, kl = power.item(), kl.item()
        self.costs.append(kl)
        self.moments = moments_after(self.moments, power, self.betas)
        ratio = moments_ratio(self.moments, self.betas)
        if ratio:
            self.kappa = self.memory * self.kappa + (1 - self.memory) * kl / ratio
            self.weight = self.memory * self.weight + (1 - self.memory)

    def metrics(self) -> dict[str, float]:
        """Return update_kl and predicted_kl (docs/metrics.md); {} if there was no update."""
        if not self.costs:
            return {}
        found = {"update_kl": sum(self.costs) / len(self.costs)}
        if self.predicted is not None:
            found["predicted_kl"] = self.predicted
        return found

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        updates, first, second = self.moments
        return {
            "updates": updates,
            "first": first,
            "second": second,
            "kappa": self.kappa,
            "weight": self.weight,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what a checkpoint keeps. Those of version 0.2 and earlier lack it."""
        if "weight" in state:
            self.moments = (int(state["updates"]), float(state["first"]), float(state["second"]))
            self.kappa = float(state["kappa"])
            self.weight = float(state["weight"])


def main(args: Args) -> Log:
    """Train, and return the log. Raises InputError, RunError or Stopped (common/errors.py)."""
    # --- Setup ---
    cli.check(args)
    processes = Processes(args.process_timeout)
    rows = processes.rows(args.prompts_per_step * args.group_size)  # [b] global row numbers
    checkpoints = Checkpoints(args, processes)  # chooses the run's folder, reads --resume
    prompts = read_prompts(args.prompts)
    eval_prompts = read_prompts(args.eval_prompts) if args.eval_prompts else []
    all_prompts = prompts + eval_prompts
    rewards = Rewards(args, all_prompts, clips=models.family_of(args.model, args.source).video)
    keep_initial = args.kl_coef > 0
    plan = memory.settle(args, processes, rewards.scorers, keep_initial)
    args = plan.args  # --micro-batch auto and what the free memory decides are settled now
    model = models.load(args.model, processes.dtype, all_prompts, **args.model_settings())
    policy = Policy(model, args, processes, plan, keep_initial)
    evaluator = Evaluator(args, model, rewards, eval_prompts, processes, checkpoints)
    evaluator.smoke_test(prompts[0])  # one sample through model and rewards: faults show now
    region = TrustRegion(args.kl_limit, betas=policy.optimizer.param_groups[0]["betas"])
    start = checkpoints.resume(policy, {"region": region})
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
        terms = rewards.terms(reward, scores)  # [(rewards [P, G], weight)], by --aggregate
        kept = groups.keep_rows(reward, args.best_of, args.min_spread)  # [P, G] bool: trained on
        shape = partial(
            shape_terms, terms, adv_clip_max=args.adv_clip_max, normalize=args.normalize
        )
        gamma = args.gamma
        if args.gamma == "auto":
            # mean square of the advantages that each gamma would give
            powers = {g: sum(shape(gamma=g))[kept].square().mean() for g in GAMMAS}
            gamma = region.choose_gamma(powers, updates=args.updates_per_step * args.minibatches)
        parts = shape(gamma=gamma)
        advantages = sum(parts)  # [P, G]
        local_advantages = processes.local(advantages)  # [b]
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
            means = {}  # {t: [n, ...]} of the first micro-batch, before the update
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
                    if args.gamma == "auto" and mb is micro_batches[0]:
                        means[t] = mean.detach()
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
                if args.gamma == "auto":  # the update's KL, from the means before and after it
                    mb = micro_batches[0]  # the one with the fewest padding rows
                    cond_mb = models.take(cond, mb.on_device)
                    kls = []
                    for t in trained_steps:
                        x, sigma, sigma_next = latents.at(mb, t), sigmas[t], sigmas[t + 1]
                        with policy.sampling():  # no gradients
                            velocity = policy.velocity(x, sigma, cond_mb)
                        _, _, mean = transition(velocity, x, sigma, sigma_next, s[t])
                        std = sde.transition_std(sigma, sigma_next, s[t])
                        kls.append(loss.gaussian_kl(mean, means[t], std))
                    cost = processes.gather(torch.stack(kls).mean(0))[processes.gather(mb.real)]
                    region.observe(advantages[minibatch].square().mean(), cost.mean())
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
        metrics["gamma"] = gamma
        metrics["batch_std"] = reward[reward.isfinite()].std(unbiased=False)
        metrics |= region.metrics()
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
