"""GRPO for image and video generators: DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv
2505.05470) in one file.

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A step samples G images for each of P prompts, scores them,
and raises the probability of those above their group's mean:

    A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps)                     compute_advantages
    rho  = exp(log_prob_new - log_prob_old)                              sde.sde_step, to sample and to re-score
    L    = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)               loss.clipped_surrogate
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                     loss.gaussian_kl

Shapes: P prompts a step, G samples a prompt (the group), B = P * G rows, b rows of this process, T
denoising steps.

    python grpo_base.py          # on GPUs: accelerate launch grpo_base.py --model flux
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

import papers
from common import cli, errors, loss, models, rewards, sde
from common.prompts import prompts_ahead, prompts_of_step, read_prompts
from common.reporting.report import Clock, Report
from common.rewards.scoring import Scoring
from common.trainer import heldout
from common.trainer.runtime import Runtime

EPS = 1e-8  # in every division by a standard deviation


@dataclass
class Args(cli.Args):
    """GRPO has no settings beyond the shared ones."""

    SETTINGS = papers.GRPO


def combine_scores(
    scores: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]
) -> torch.Tensor:
    """{name: [P, G]} and {name: weight} -> rewards [P, G]: the weighted sum."""
    return rewards.weighted_sum(scores, weights)


def compute_advantages(reward: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    """Rewards [P, G] -> advantages [P, G]: normalised within each group (population standard
    deviation), clamped.

    A group whose rewards are all equal has advantage 0, exactly, as has a sample without a score
    (NaN)."""
    centred = reward - reward.nanmean(1, keepdim=True)
    advantages = centred / (centred.square().nanmean(1, keepdim=True).sqrt() + EPS)
    return torch.where(zero_variance(reward) | reward.isnan(), 0.0, advantages).clamp(
        -adv_clip_max, adv_clip_max
    )


def zero_variance(reward: torch.Tensor) -> torch.Tensor:
    """Rewards [P, G] -> [P, 1]: groups that have nothing to teach: all their scores are equal, or
    fewer than two."""
    highest = reward.masked_fill(reward.isnan(), -torch.inf).amax(1, keepdim=True)
    lowest = reward.masked_fill(reward.isnan(), torch.inf).amin(1, keepdim=True)
    return highest <= lowest  # below it where no sample has a score


def keep_rows(reward: torch.Tensor, best_of: int) -> torch.Tensor:
    """Rewards [P, G] -> rows to train on [P, G] bool: those with a score (not NaN) in groups with
    two or more of them; of these the best_of/2 highest and lowest of each group; 0: all."""
    valid = ~reward.isnan()
    number = valid.sum(1, keepdim=True)  # [P, 1]
    order = reward.argsort(
        dim=1, stable=True
    )  # of each group the numbers of its samples, the worst first, NaN last
    rank = order.argsort(dim=1)  # of each sample its place in that order
    half = best_of // 2 if best_of else reward.shape[1]
    return valid & (number > 1) & ((rank < half) | (rank >= number - half))


def split_rows(kept: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Rows to train on [P, G] bool -> `number` disjoint minibatches of them, each with its share of
    every group."""
    turn = kept.cumsum(1)  # the samples of a group are dealt out in turn
    return [kept & (turn % number == part) for part in range(number)]


def main(args: Args) -> Report:
    """Trains, and returns the Report. Raises InputError, RunError, Stopped (common/errors.py)."""
    # --- Setup ---
    cli.check(args)
    prompts, reward_weights = read_prompts(args.prompts), rewards.parse(args.reward)
    eval_prompts = read_prompts(args.eval_prompts) if args.eval_prompts else []
    scorers = rewards.load(
        [*args.reward, *args.watch], prompts + eval_prompts, **cli.of_rewards(args)
    )
    reward_weights = rewards.in_units(args.reward_units, reward_weights, scorers)
    run = Runtime(args, scorers)
    model = models.load(args.model, run.dtype, prompts + eval_prompts, **cli.of_model(args))
    sigmas = model.sigmas(args.sampling_steps, args.shift)  # [T+1]
    if args.kl_coef:
        run.keep_initial(model)
    stateful = {"optimizer": run.prepare(model), **model.trainable}  # what a checkpoint holds
    rewards.try_out(scorers, model, prompts[0])
    start = run.resume(stateful)
    report = Report(run, start)
    P, G, B = args.prompts_per_step, args.group_size, args.prompts_per_step * args.group_size
    transition = sde.TRANSITIONS[args.sde]
    rows = run.rows(B)  # [b]

    for step in report.steps(start, args.steps):
        metrics = heldout.evaluate(run, report, model, scorers, reward_weights, eval_prompts, step)
        clock = Clock(run.device)

        # --- Rollout ---
        chance = torch.Generator().manual_seed(
            args.seed * 1_000_003 + step
        )  # the choices that all processes share
        window = sde.random_window(
            args.sde_steps or args.sampling_steps - 1, args.sde_window, chance
        )
        s = sde.diffusion_coefficients(sigmas, args.noise_level, args.sde, window)  # [T]
        batch = prompts_of_step(prompts, step, P, args.seed)
        captions = [batch[row // G] for row in rows]
        cond = model.encode(captions, prompts_ahead(prompts, step, P, args.seed, rows // G))
        first = rows // G * G if args.same_noise else rows  # whose initial noise a row starts from
        trajectories, scoring = [], Scoring(scorers, model, captions, run.score_batch)
        for mb in run.batches(len(rows)):
            x = sde.RowNoise(args.seed, step, first[mb], run.device)(model.noise_shape)
            noise = sde.RowNoise(
                args.seed, step, B + rows[mb], run.device
            )  # streams behind those of x
            velocity = partial(model.velocity, cond=models.take(cond, mb))
            with torch.no_grad():
                trajectories.append(sde.rollout(velocity, x, sigmas, s, noise, transition))
            scoring.add(
                trajectories[-1][0][:, -1]
            )  # a judge's server works while the next rows are sampled
        latents, log_probs = (
            torch.cat(part)[: len(rows)] for part in zip(*trajectories)
        )  # [b, T+1, ...], [b, T]
        metrics["rollout_seconds"] = clock.lap()

        # --- Reward ---
        scores = {name: run.gather(score).view(P, G) for name, score in scoring.result().items()}
        rewards.check_finite(scores, scorers, batch)
        metrics["reward_seconds"] = clock.lap()

        # --- Advantage ---
        reward = combine_scores(scores, reward_weights)  # [P, G]
        terms = rewards.terms(
            args.aggregate, reward, scores, reward_weights
        )  # what is normalised by itself
        parts = [w * compute_advantages(r, args.adv_clip_max) for r, w in terms]  # [P, G]
        advantages = sum(parts)  # [P, G]
        advantage = run.local(advantages)  # [b]
        spread = (
            (reward - reward.nanmean(1, keepdim=True)).square().nanmean(1, keepdim=True).sqrt()
        )  # [P, 1]
        kept = keep_rows(reward, args.best_of) & ~(spread < args.min_spread)  # [P, G]
        minibatches = split_rows(kept, args.minibatches)

        # --- Update ---
        run.blame = partial(
            rewards.blame, scores, advantages, batch
        )  # for a gradient that is no number
        diagnostics = []
        for update in range(args.updates_per_step * args.minibatches):
            minibatch = minibatches[update % args.minibatches]
            # rows without advantage and without KL have no gradient
            learning = minibatch if args.kl_coef else minibatch & advantages.any(1, keepdim=True)
            share = learning / minibatch.sum()  # of each sample in the loss [P, G]
            row_share = pad(run.local(share), (0, 1))  # [b + 1]: 0 for row -1, the filler
            diagnostics.append([])
            trained = sde.noisy_steps(s, args.timestep_fraction, chance)
            last_steps = {model.trained_at(sigmas[t]): t for t in trained}  # of each trained module
            batches = run.micro_batches(learning)
            for mb in batches:
                cond_mb = models.take(cond, mb)
                for t in trained:
                    x, x_next, at = (
                        latents[mb, t],
                        latents[mb, t + 1],
                        (sigmas[t], sigmas[t + 1], s[t]),
                    )
                    # until a module's last pass each process adds up its own gradients
                    run.exchange_gradients(mb is batches[-1] and t in last_steps.values())
                    velocity = model.velocity(x, sigmas[t], cond_mb)
                    _, log_prob, mean = transition(velocity, x, *at, x_next=x_next)
                    ratio = torch.exp(log_prob - log_probs[mb, t])  # [mb]
                    row_loss = loss.clipped_surrogate(ratio, advantage[mb], args.clip_range)
                    if args.kl_coef:
                        with run.initial_weights():
                            _, _, reference = transition(
                                model.velocity(x, sigmas[t], cond_mb), x, *at
                            )
                        row_loss += args.kl_coef * loss.gaussian_kl(
                            mean, reference, sde.transition_std(*at)
                        )
                    batch_loss = (row_share[mb] * row_loss).sum() / len(trained)
                    run.backward(batch_loss)
                    diagnostics[-1].append(
                        loss.diagnostics(ratio, args.clip_range, row_share[mb], batch_loss, update)
                    )
            metrics["grad_norm"] = run.update() if batches else 0.0
        metrics["update_seconds"] = clock.lap()

        # --- Log ---
        metrics |= loss.summarise(diagnostics, run.gather)
        run.check_ratio(metrics["ratio_error"])
        metrics |= {
            "reward_mean": reward.nanmean(),
            "reward_std": spread.nanmean(),
            "advantage_abs_mean": advantages.abs().mean(),
            "masked_samples": reward.isnan().sum(),
            "skipped_groups": (~kept.any(1)).sum(),
        }
        metrics |= {f"{name}_mean": score.nanmean() for name, score in scores.items()}
        metrics |= rewards.shares(scores, reward_weights, parts)
        metrics["samples_per_second"] = B / sum(
            metrics[f"{part}_seconds"] for part in ("rollout", "reward", "update")
        )
        report.log(step, metrics)

        # --- Checkpoint ---
        if run.due(step + 1):
            run.save(step + 1, stateful)

    final = heldout.evaluate(
        run, report, model, scorers, reward_weights, eval_prompts, args.steps, last=True
    )
    return report.finish(args.steps, final, run.export())


if __name__ == "__main__":
    errors.run(main, cli.parse(Args, __doc__))
