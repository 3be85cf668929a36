"""Score samples with rewards.

`Rewards` (rewards.py) holds the scorers and weights of a run; table.py has their names. A scorer is
a class, in the table or in a file of your own (`my/file.py:Class`), with

    score(media, prompts) -> [b] float32    media [b, C, H, W] (video [b, F, C, H, W]) in [0, 1]
    video                                   True: scores clips whole; False: a clip's score is the
                                            mean over some of its frames
    scale                                   typical standard deviation within a group, above 0
    range                                   (lowest, highest); None where there is no bound

and optionally

    fields          names of fields that the prompts' lines of JSONL must have; score gets each as a
                    keyword, a list of b values: score(media, prompts, text). Without it,
                    common.prompts.fields_of(prompt) returns the fields that a prompt has. "source"
                    is no field of the line: it is the N images of each prompt, cropped and resized
                    to the samples, [b, N, 3, H, W] in [0, 1]: score(media, prompts, source)
    masks           True: a score may be NaN for a sample that could not be judged; the group is
                    then treated as if it had one sample less
    missing         {kind: cause} of the samples without a score, for the log. With a cause, a
                    first sample without a score ends the run
    image           False: scores clips only
    elsewhere       True: another machine computes the scores while sampling continues
    check(prompts)  raises ValueError for a prompt that it cannot score
    text_in(media)  the text in each of media [b, C, H, W], b strings, for the run's pictures
    load(source, batch)  loads its weights (weights.Source), `batch` samples a forward pass

README.md in this folder lists the use, the size and the licence of each reward.
"""

from common.rewards.rewards import Rewards, Scoring, shares, weighted_sum
from common.rewards.table import REWARDS, parse, split

__all__ = ["REWARDS", "Rewards", "Scoring", "parse", "shares", "split", "weighted_sum"]
