"""Self-Paced GRPO (arXiv 2511.19356): the reward grows with the generator. Against grpo_base.py:

  Setup              --reward lists stages, from easy to hard; the last one scores the held-out
                     samples; --calibrate measures the thresholds first (appendix A)
  Advantage          each group mixes the stages, by gates that open as mean rewards pass thresholds
  Log                the weight and the mean reward of each stage

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A training step samples G images for each of P prompts,
scores them, and raises the probability of those that score above the mean of their group:

    S(r) = (sqrt(G) - |r|_1 / |r|_2) / (sqrt(G) - 1)                   hoyer_sparsity     eq 8
    g_k  = sigmoid(slope (mean r_k - tau_k))                           stage_gates        eq 9
           + beta (S(r_k-1) - S(r_k)), without this term for k = 1
    w    = softmax(alpha g)                                            stage_weights      eq 6
    R    = sum_k w_k r_k                                               combine_scores     eq 5
    A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps)                   compute_advantages
    rho  = exp(log_prob_new - log_prob_old)                            main, Update; sde.sde_step
    L    = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)             loss.clipped_surrogate
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                   loss.gaussian_kl

These are the equations of the paper's first version. Version 4 (July 2026) calls the method TaRoS
and changes one of them. --variant v4 takes it, with alpha 1:

    g_k  = sigmoid(slope (mean r_k - tau_k))                           stage_utilities    eq 6
           + beta (S(r_k) - S(r_k+1)),  S(r_K+1) = 0

Shapes: P prompts a step, G samples a prompt (the group); row = prompt * G + sample, b rows on each
process; n rows of a micro-batch, the last of which may be padding; T denoising steps, K stages.

    python self_paced.py         # on GPUs: accelerate launch self_paced.py --model wan2.1-1.3b
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch

import papers
from common import cli, errors, groups, loss, memory, models, sde
from common.args import Args as SharedArgs
from common.args import From
from common.prompts import prompts_ahead, prompts_of_step, read_prompts
from common.rewards import Rewards, shares
from common.trainer import (
    Checkpoints,
    Clock,
    Evaluator,
    Latents,
    Log,
    Policy,
    Processes,
    run_folder,
)

EPS = 1e-8  # added to every standard deviation that rewards are divided by


@dataclass
class Args(SharedArgs):
    variant: Literal["v1", "v4"] = "v1"
    """Version of the paper. v4 (July 2026, TaRoS) compares the saturation of a stage with that of
    the next stage instead of the one before, and has other defaults for the paper's models."""
    thresholds: Annotated[tuple[float, ...], From(-1e6, 1e6)] = (0.929, 0.81, 0.6)
    """tau: the mean reward, in [0, 1], at which each gate is half open. One for each stage; with
    --gate previous the last one has no effect and may be left out."""
    gate: Literal["own", "previous"] = "own"
    """Whose mean reward opens a stage's gate. own: the stage's own, as eq 9 is printed. previous:
    that of the stage before it, as the text of v1 suggests; only for --variant v1."""
    alpha: Annotated[float, From(0, 1000)] = 4.0
    """How sharply the weights follow the gates. 0 gives all stages the same weight. With --variant
    v4 the default is 1, because its equation has no alpha."""
    beta: Annotated[float, From(0, 1000)] = 0.5
    """Weight of the difference in saturation between a stage and its neighbour. 0 disables it."""
    slope: Annotated[float, From(0, 1000)] = 10.0
    """How steeply a gate opens around its threshold. At 10 a mean reward 0.1 above it opens the
    gate to 73%."""
    saturation: Literal["hoyer", "one-minus-hoyer"] = "hoyer"
    """Index of saturation. hoyer: Hoyer's index as printed, 0 for equal rewards. one-minus-hoyer: 1
    minus it, as the text of v1 describes it; only for --variant v1."""
    stage_range: Annotated[tuple[float, ...], From(-1e6, 1e6)] = ()
    """LOW HIGH. Scores of rewards that declare no bounds are mapped from this range to [0, 1]. For
    VideoAlign: -3 3. Other rewards need no range."""
    only_stage: Annotated[int, From(0, 100)] = 0
    """Train on this stage alone, counted from 1. 0 trains on all stages."""
    calibrate: bool = False
    """First train on each stage that opens a gate alone, for 50 steps each. Its threshold is then
    its mean reward at the start plus 0.7 times its gain."""

    SETTINGS = papers.SELF_PACED
    VARIANTS = {"v4": papers.SELF_PACED_V4}
    CURVES = ("weight", "competence")
    TITLE = "Self-Paced GRPO"
    ARXIV = ("2511.19356",)


def combine_scores(
    scores: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the mix of the stages: {name: [P, G]}, {name: [P, 1]} -> rewards [P, G] (eq 5)."""
    return sum(weight * scores[name] for name, weight in weights.items())


def hoyer_sparsity(rewards: torch.Tensor) -> torch.Tensor:
    """Return Hoyer's index of each group: rewards [..., G] -> [...] in [0, 1] (eq 8).

    The index is 0 if all rewards are equal, and 1 if all but one are 0. NaN is a sample without a
    score.
    """
    norm = rewards.square().nansum(-1).sqrt()
    root = rewards.isfinite().to(rewards).sum(-1).sqrt()
    index = (root - rewards.abs().nansum(-1) / norm) / (root - 1).clamp(min=EPS)
    return torch.where(norm > 0, index, 0.0)


def stage_gates(
    rewards: torch.Tensor,
    thresholds: tuple[float, ...],
    beta: float,
    slope: float,
    saturation: str = "hoyer",
    gate: str = "own",
) -> torch.Tensor:
    """Return the gates of K stages (v1 eq 9): rewards [K, P, G], thresholds -> [K, P].

    gate "own": the mean reward of a stage opens its gate, as eq 9 is printed. This needs K
    thresholds. "previous": the mean reward of the stage before it does. This needs K - 1, and the
    gate of the first stage is always half open.
    """
    S = hoyer_sparsity(rewards)  # [K, P]
    if saturation == "one-minus-hoyer":
        S = 1 - S
    opener = rewards[:-1] if gate == "previous" else rewards  # [K-1 or K, P, G]
    tau = rewards.new_tensor(thresholds[: len(opener)])[:, None]
    opened = torch.sigmoid(slope * (opener.nanmean(-1) - tau))
    if gate == "previous":
        opened = torch.cat([torch.full_like(S[:1], 0.5), opened])
    less_saturated = torch.cat([torch.zeros_like(S[:1]), S[:-1] - S[1:]])  # none before the first
    return opened + beta * less_saturated


def stage_utilities(
    rewards: torch.Tensor, thresholds: tuple[float, ...], beta: float, slope: float
) -> torch.Tensor:
    """Return the utilities of K stages (v4 eq 6): rewards [K, P, G], K thresholds -> [K, P]."""
    S = hoyer_sparsity(rewards)  # [K, P]
    S_next = torch.cat([S[1:], torch.zeros_like(S[:1])])  # 0 after the last stage
    tau = rewards.new_tensor(thresholds)[:, None]
    return torch.sigmoid(slope * (rewards.nanmean(-1) - tau)) + beta * (S - S_next)


def stage_weights(gates: torch.Tensor, alpha: float, only_stage: int = 0) -> torch.Tensor:
    """Return the weights of K stages: gates [K, P] -> [K, P], which sum to 1 over K.

    This is v1 eq 6, and v4 eq 7 if alpha is 1. only_stage: the stage that gets all weight, counted
    from 1; 0: the gates decide.
    """
    if only_stage:
        weights = torch.zeros_like(gates)
        weights[only_stage - 1] = 1.0
        return weights
    return torch.softmax(alpha * gates, dim=0)


def on_unit_interval(
    scores: dict[str, torch.Tensor], ranges: dict[str, tuple[float, float]]
) -> dict[str, torch.Tensor]:
    """Return the scores of the stages on [0, 1]: {name: [P, G]}, {name: (low, high)} of each stage.

    A sample that lacks one of these scores (NaN) gets NaN for all of them.
    """
    missing = sum(scores[name] for name in ranges).isnan()  # [P, G]
    return {
        name: ((scores[name] - low) / (high - low)).masked_fill(missing, torch.nan)
        for name, (low, high) in ranges.items()
    }


def stage_ranges(args: Args, rewards: Rewards) -> dict[str, tuple[float, float]]:
    """Return {name: (low, high)} of the stages: what a reward declares, else --stage-range."""
    ranges = {}
    for name in rewards.weights:
        ranges[name] = rewards.scorers[name].range
        if None in ranges[name]:
            ranges[name] = args.stage_range
    return ranges


def check_only_stage(args: Args) -> None:
    """Raise InputError for a stage that --reward does not name."""
    number = len(args.reward)
    if args.only_stage > number:
        raise errors.InputError(
            f"--only-stage {args.only_stage}: there is no such stage, --reward names {number}."
        )


def check_stages(args: Args, rewards: Rewards) -> None:
    """Raise InputError for stages that cannot be mixed."""
    number = len(rewards.weights)
    if set(rewards.weights.values()) != {1.0}:
        raise errors.InputError("--reward: stages have no weights. Leave =WEIGHT out.")
    if args.aggregate != "rewards":
        raise errors.InputError(
            "--aggregate advantages: stages are mixed as rewards. Leave it out."
        )
    needed = number - 1 if args.gate == "previous" else number
    if len(args.thresholds) not in (needed, number):
        stages = "1 stage, which needs" if number == 1 else f"{number} stages, which need"
        raise errors.InputError(
            f"--thresholds: --reward has {stages} {needed}, got {len(args.thresholds)}."
        )
    check_only_stage(args)
    if args.variant == "v4" and args.gate == "previous":
        raise errors.InputError("--gate previous: only for --variant v1. Leave it out.")
    if args.variant == "v4" and args.saturation != "hoyer":
        raise errors.InputError(
            f"--saturation {args.saturation}: only for --variant v1. Leave it out."
        )
    if args.stage_range and (
        len(args.stage_range) != 2 or args.stage_range[0] >= args.stage_range[1]
    ):
        given = " ".join(f"{value:g}" for value in args.stage_range)
        raise errors.InputError(f"--stage-range {given}: not two rising numbers. Give LOW HIGH.")
    for name in rewards.weights:
        if None in rewards.scorers[name].range and not args.stage_range:
            raise errors.InputError(
                f"--reward {name}: its scores have no bounds. Give them: --stage-range LOW HIGH."
            )


def calibrate(args: Args) -> Args:
    """Return args with thresholds from runs of each stage that opens a gate (appendix A).

    A run that continues takes the thresholds from its config.json.
    """
    if not args.calibrate:
        return args
    check_only_stage(args)
    processes = Processes(args.process_timeout)
    folder = processes.from_main(lambda: run_folder.choose(args))
    source = run_folder.run_of(args.resume)  # whose checkpoint a new run begins with
    known = run_folder.config_of(folder)
    if source and not known:
        known = run_folder.config_of(source)
    if known:
        return replace(args, thresholds=tuple(known.get("thresholds", args.thresholds)))
    thresholds = []
    openers = args.reward[:-1] if args.gate == "previous" else args.reward
    for name in openers:
        short_name = name.split("/")[-1].replace(":", "-")
        alone = replace(
            args,
            reward=(name,),
            thresholds=(0.0,),  # without effect: a single stage has weight 1
            only_stage=0,
            steps=50,
            calibrate=False,
            push_to_hub="",
            output=f"{folder}/calibrate-{short_name}",
            resume="latest" if args.resume else "",
        )
        first, last = main(alone).ends("reward_mean", 5)
        thresholds.append(first + 0.7 * (last - first))
    measured = " ".join(f"{threshold:.3f}" for threshold in thresholds)
    processes.print(f"measured: --thresholds {measured}")
    return replace(args, thresholds=tuple(thresholds), output=str(folder))


def compute_advantages(reward: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    """Return the advantages: rewards [P, G] -> [P, G], normalised within each group and clamped.

    The standard deviation is the population one. A group whose rewards are all equal has advantage
    0, exactly, as has a sample without a score (NaN).
    """
    centred = reward - reward.nanmean(1, keepdim=True)
    advantages = centred / (centred.square().nanmean(1, keepdim=True).sqrt() + EPS)
    advantages = torch.where(groups.zero_variance(reward) | reward.isnan(), 0.0, advantages)
    return advantages.clamp(-adv_clip_max, adv_clip_max)


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
    check_stages(args, rewards)
    ranges = stage_ranges(args, rewards)  # {name: (low, high)}
    rewards.weights = {list(ranges)[-1]: 1.0}  # held-out samples are scored by the last stage
    keep_initial = args.kl_coef > 0
    plan = memory.settle(args, processes, rewards.scorers, keep_initial)
    args = plan.args  # --micro-batch auto and what the free memory decides are settled now
    model = models.load(args.model, processes.dtype, all_prompts, **args.model_settings())
    policy = Policy(model, args, processes, plan, keep_initial)
    evaluator = Evaluator(args, model, rewards, eval_prompts, processes, checkpoints)
    evaluator.smoke_test(prompts[0])  # one sample through model and rewards: faults show now
    start = checkpoints.resume(policy)
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
        stages = on_unit_interval(scores, ranges)  # {name: [P, G]} of K stages
        stacked = torch.stack(list(stages.values()))  # [K, P, G]
        if args.variant == "v4":
            gates = stage_utilities(stacked, args.thresholds, args.beta, args.slope)  # [K, P]
        else:
            gates = stage_gates(
                stacked,
                thresholds=args.thresholds,
                beta=args.beta,
                slope=args.slope,
                saturation=args.saturation,
                gate=args.gate,
            )  # [K, P]
        weights = stage_weights(gates, args.alpha, args.only_stage)[:, :, None]  # [K, P, 1]
        stage_weight = dict(zip(stages, weights))  # {name: [P, 1]}
        reward = combine_scores(stages, stage_weight)  # [P, G]
        terms = rewards.terms(reward, scores)  # [(rewards [P, G], weight)], by --aggregate
        parts = [weight * compute_advantages(r, args.adv_clip_max) for r, weight in terms]
        advantages = sum(parts)  # [P, G]
        local_advantages = processes.local(advantages)  # [b]
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
        metrics |= {f"weight_{name}": w.nanmean() for name, w in stage_weight.items()}
        metrics |= shares(stages, stage_weight)
        metrics |= {f"competence_{name}": r.nanmean() for name, r in stages.items()}
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
    cli.launch(main, Args, __doc__, prepare=calibrate)
