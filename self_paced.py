"""Self-Paced GRPO (arXiv 2511.19356), whose reward grows with the generator. Against grpo_base.py:

  --reward names ordered stages, easy to hard; each group mixes them, moving on past thresholds (appendix A).

The sampler of a flow model becomes a stochastic policy (common/sde.py): each denoising step is a
Gaussian with an exact log-probability. A step samples G images for each of P prompts, scores them,
and raises the probability of those above their group's mean:

    S(r) = (sqrt(G) - |r|_1 / |r|_2) / (sqrt(G) - 1)                     hoyer_sparsity            eq 8
    g_k  = sigmoid(slope (mean r_k-1 - tau_k-1)) + beta (S(r_k-1) - S(r_k))  stage_weights         eq 9
    R    = sum_k w_k r_k,  w = softmax(alpha g)                          combine_scores            eq 5, 6
    A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps)                     compute_advantages
    rho  = exp(log_prob_new - log_prob_old)                              sde.sde_step, to sample and to re-score
    L    = - mean of min(rho A, clip(rho, 1 - c, 1 + c) A)               loss.clipped_surrogate
           + kl_coef |mean - mean_ref|^2 / (2 std^2)                     loss.gaussian_kl

Shapes: P prompts a step, G samples a prompt (the group), B = P * G rows, b rows of this process, T
denoising steps.

    python self_paced.py         # on GPUs: accelerate launch self_paced.py --model wan2.1-1.3b
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

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
    thresholds: Annotated[tuple[float, ...], cli.From(-1e6, 1e6)] = (0.929, 0.81)
    """tau of each stage that opens a gate: the mean reward at which that gate is half open."""
    gate: Literal["previous", "own"] = "previous"
    """Whose mean reward opens a stage's gate: the stage's before it, as the text says; its own, as
    eq 9 is printed."""
    alpha: Annotated[float, cli.From(0, 1000)] = 4.0
    """How sharply the weights follow the gates; 0: all stages count the same, the ablation
    `joint`."""
    beta: Annotated[float, cli.From(0, 1000)] = 0.5
    """Weight of the difference in saturation between a stage and the one before."""
    slope: Annotated[float, cli.From(0, 1000)] = 10.0
    """How steeply a gate opens around its threshold."""
    saturation: Literal["hoyer", "one-minus-hoyer"] = "hoyer"
    """The printed index, 0 for equal rewards; or what the paper says of it, that equal rewards are
    saturated."""
    only_stage: Annotated[int, cli.From(0, 100)] = 0
    """Train on this stage alone, the ablations `one-stage` (1) and `two-stage` (2 holds 1); 0: on
    all."""
    calibrate: bool = False
    """Train each stage that opens a gate alone for 50 steps first; its tau is where it started +
    0.7 * its gain."""
    SETTINGS, CURVES = papers.SELF_PACED, ("weight", "competence")


def combine_scores(
    scores: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]
) -> torch.Tensor:
    """{name: [P, G]} and {name: weight} -> rewards [P, G]: the weighted sum."""
    return rewards.weighted_sum(scores, weights)


def hoyer_sparsity(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [..., G] -> [...] in [0, 1] (eq 8): 0 if they are all equal, 1 if one alone is not 0.
    NaN: none."""
    size, root = rewards.square().nansum(-1).sqrt(), rewards.isfinite().to(rewards).sum(-1).sqrt()
    return torch.where(
        size > 0, (root - rewards.abs().nansum(-1) / size) / (root - 1).clamp(min=EPS), 0.0
    )


def stage_weights(
    rewards: torch.Tensor,
    thresholds: tuple[float, ...],
    alpha: float,
    beta: float,
    slope: float,
    saturation: str = "hoyer",
    only: int = 0,
    gate: str = "previous",
) -> torch.Tensor:
    """Rewards [K, P, G] of K stages, K - 1 thresholds -> weights [K, P] (eq 6, 9). The first gate
    stands half open."""
    S = hoyer_sparsity(rewards) if saturation == "hoyer" else 1 - hoyer_sparsity(rewards)  # [K, P]
    above = (rewards[:-1] if gate == "previous" else rewards[1:]).nanmean(-1) - rewards.new_tensor(
        thresholds
    )[:, None]
    gates = torch.cat(
        [torch.full_like(S[:1], 0.5), torch.sigmoid(slope * above) + beta * (S[:-1] - S[1:])]
    )  # [K, P]
    alone = (
        (torch.arange(1, len(gates) + 1) == only)[:, None].expand_as(gates).to(gates)
    )  # 1 for that stage, 0 else
    return alone if only else torch.softmax(alpha * gates, dim=0)


def check_stages(args: Args, scorers: dict, reward_weights: dict[str, float]) -> dict[str, float]:
    """Raises InputError for stages that cannot be mixed; returns the evaluation's reward weights:
    the last stage's."""
    number, plain = (
        len(reward_weights),
        set(reward_weights.values()) == {1.0} and args.aggregate == "rewards",
    )
    if not plain or len(args.thresholds) != number - 1 or args.only_stage > number:
        raise errors.InputError(
            f"{number} stages: a threshold less; no =WEIGHT, --aggregate, later --only-stage"
        )
    rewards.require_range({name: scorers[name] for name in reward_weights})
    return {list(reward_weights)[-1]: 1.0}


def calibrate(args: Args) -> Args:
    """args with the run's own thresholds, or with new ones from runs of each stage that opens a
    gate (appendix A)."""
    folder, known = Runtime.find(args)
    if known:
        return replace(args, thresholds=tuple(known.get("thresholds", args.thresholds)))
    thresholds, alone = [], replace(args, thresholds=(), only_stage=0, steps=50, calibrate=False)
    for name in args.reward[:-1] if args.gate == "previous" else args.reward[1:]:
        alone = replace(
            alone,
            reward=(name,),
            output=f"{folder}/calibrate-{name.split('/')[-1].replace(':', '-')}",
        )
        start, end = main(replace(alone, resume=args.resume and "latest")).ends("reward_mean", 5)
        thresholds.append(start + 0.7 * (end - start))
    Runtime.print("measured: --thresholds", *(f"{threshold:.3f}" for threshold in thresholds))
    return replace(args, thresholds=tuple(thresholds), output=str(folder))


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
    args = calibrate(args) if args.calibrate else args
    prompts, reward_weights = read_prompts(args.prompts), rewards.parse(args.reward)
    eval_prompts = read_prompts(args.eval_prompts) if args.eval_prompts else []
    scorers = rewards.load(
        [*args.reward, *args.watch], prompts + eval_prompts, **cli.of_rewards(args)
    )
    reward_weights = rewards.in_units(args.reward_units, reward_weights, scorers)
    reward_weights = check_stages(args, scorers, reward_weights)
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
        stages = rewards.on_unit_interval(
            scores, scorers, rewards.parse(args.reward)
        )  # K times [P, G]
        pace = (
            args.thresholds,
            args.alpha,
            args.beta,
            args.slope,
            args.saturation,
            args.only_stage,
            args.gate,
        )
        stage_weight = dict(
            zip(stages, stage_weights(torch.stack([*stages.values()]), *pace)[:, :, None])
        )  # [P, 1]
        reward = combine_scores(stages, stage_weight)  # [P, G]
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
        metrics |= {f"weight_{n}": x.nanmean() for n, x in stage_weight.items()} | rewards.shares(
            stages, stage_weight
        )
        metrics |= {f"competence_{n}": x.nanmean() for n, x in stages.items()}
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
