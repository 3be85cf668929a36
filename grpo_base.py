"""GRPO for image and video generators: DanceGRPO (arXiv 2505.07818) and Flow-GRPO (2505.05470).

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A training step samples G images for each of P prompts,
scores them, and raises the probability of those that score above the mean of their group:

    A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps)                   compute_advantages
    rho  = exp(log_prob_new - log_prob_old)                            main, Update; sde.sde_step
    L    = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)             loss.clipped_surrogate
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                   loss.gaussian_kl

Shapes: P prompts a step, G samples a prompt (the group); row = prompt * G + sample, b rows on each
process; n rows of a micro-batch, the last of which may be padding; T denoising steps.

    python grpo_base.py          # on GPUs: accelerate launch grpo_base.py --model flux
"""

from dataclasses import dataclass
from functools import partial

import torch

import papers
from common import cli, errors, groups, loss, memory, models, sde
from common.args import Args as SharedArgs
from common.prompts import prompts_ahead, prompts_of_step, read_prompts
from common.rewards import Rewards
from common.trainer import Checkpoints, Clock, Evaluator, Latents, Log, Policy, Processes

EPS = 1e-8  # added to every standard deviation that rewards are divided by


@dataclass
class Args(SharedArgs):
    """GRPO has no settings beyond the shared ones."""

    SETTINGS = papers.GRPO
    TITLE = "GRPO"
    ARXIV = ("2505.07818", "2505.05470")


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
        reward = combine_scores(scores, rewards.weights)  # [P, G]
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
