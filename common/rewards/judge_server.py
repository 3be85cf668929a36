"""The judge behind an OpenAI-compatible server (vLLM, SGLang), where the larger ones live."""

import base64
import importlib
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from openai.types.chat.chat_completion import Choice

from common.errors import InputError, RunError, text
from common.rewards.judge import TOKENS, Answer, Talk, digits
from common.rewards.scoring import begin

LONGEST = 2**20  # bytes of an answer: a thousand times what a number takes
PAUSE = 8.0  # seconds between two attempts, at most


class Server:
    """An OpenAI-compatible server. Requests run `concurrency` at a time, each is repeated with
    growing pauses after a time-out, a broken connection or a server's error, up to `retries` times.
    Of an answer no more than LONGEST bytes are read, and no longer than all attempts together may
    take: a time-out is the client's for each read alone."""

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        expected: bool,
        timeout: float,
        retries: int,
        concurrency: int,
        fps: float,
    ) -> None:
        self.name, self.url, self.model, self.expected, self.concurrency = (
            name,
            url,
            model,
            expected,
            concurrency,
        )
        self.timeout, self.retries = timeout, retries
        settings = dict(base_url=url, timeout=timeout, max_retries=retries, **key())
        try:
            client = openai.DefaultHttpxClient(event_hooks={"response": [bounded]})
            plain = {"Accept-Encoding": "identity"}
            self.client = openai.OpenAI(http_client=client, default_headers=plain, **settings)
            self.greet()
        except (openai.NotFoundError, openai.BadRequestError) as error:
            raise InputError(
                f"reward {name}: the server at --judge-url {url} does not take --judge-model "
                f"{model} ({text(error)})"
            ) from None
        except Exception as error:  # the client's own of an odd URL among them
            raise InputError(
                f"reward {name}: no server answers at --judge-url {url} ({text(error)})"
            ) from None

    def answers(self, talks: list[Talk]) -> list[Answer | None]:
        """Conversations -> what the model says next; None where the requests about this one alone
        failed. Raises RunError where the server has gone, or refuses what is asked."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.answer, talks))

    def answer(self, talk: Talk) -> Answer | None:
        """The same of one."""
        kwargs = (
            dict(logprobs=True, top_logprobs=20, max_tokens=1)
            if self.expected
            else dict(max_tokens=TOKENS)
        )
        try:
            return self.ask(
                chances if self.expected else words, messages=sent(talk), temperature=0.0, **kwargs
            )
        except (
            openai.APIConnectionError,
            openai.InternalServerError,
            openai.RateLimitError,
            Unreadable,
        ) as error:
            if self.alive():
                return None
            raise RunError(
                f"reward {self.name}: the server at {self.url} is gone ({text(error)}); start it "
                "again, then go on "
                "with --resume latest"
            ) from None
        except NoChances:
            raise RunError(
                f"reward {self.name}: the server at {self.url} gives no probabilities; leave "
                "--judge-expected"
            ) from None
        except openai.OpenAIError as error:
            raise RunError(
                f"reward {self.name}: the server at {self.url} refuses to judge ({text(error)})"
            ) from None

    def alive(self) -> bool:
        """Whether it still answers at all."""
        try:
            self.greet(retries=1)
        except openai.OpenAIError:
            return False
        return True

    def greet(self, retries: int | None = None) -> None:
        """The smallest request that only a server with the model at work answers."""
        self.ask(words, retries, messages=[{"role": "user", "content": "Hello"}], max_tokens=1)

    def ask(
        self, read: Callable[[Choice], Answer], retries: int | None = None, **request
    ) -> Answer:
        """`read` of the first choice in the answer. Raises openai's errors, and Unreadable for what
        is no answer."""
        retries = self.retries if retries is None else retries
        create = self.client.with_options(max_retries=retries).chat.completions.create
        try:
            within = 1.5 * self.timeout * (retries + 1) + PAUSE * retries
            return waited_for(lambda: read(create(model=self.model, **request).choices[0]), within)
        except openai.OpenAIError:
            raise
        except (
            Exception
        ) as error:  # no JSON, JSON of another kind, a probability of e to the billion
            raise Unreadable(
                f"an answer that cannot be read: {type(error).__name__}: {text(error)}"
            ) from None


class Unreadable(openai.OpenAIError):
    """An answer that is too long, takes too long, or is none of OpenAI's protocol."""


class NoChances(openai.OpenAIError):
    """An answer without the probabilities that were asked for."""


http = importlib.import_module(
    openai.DefaultHttpxClient.__base__.__module__
)  # httpx, or what openai has in its place


class Bounded(http.SyncByteStream):
    """The body of a response, as far as LONGEST bytes."""

    def __init__(self, stream: http.SyncByteStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for part in self.stream:
            length += len(part)
            if length > LONGEST:
                raise Unreadable(f"an answer of more than {LONGEST} bytes")
            yield part

    def close(self) -> None:
        """Closes the connection."""
        self.stream.close()


def bounded(response: http.Response) -> None:
    """Makes a response end in time, before its body is read. Raises Unreadable for a compressed
    one."""
    if (
        response.headers.get("content-encoding", "identity") != "identity"
    ):  # a few bytes may be gigabytes
        raise Unreadable("a compressed answer, which was not asked for")
    response.stream = Bounded(response.stream)


def waited_for(action: Callable[[], Any], seconds: float) -> Any:
    """action() in a thread of its own, which is left behind after so many seconds, and keeps no
    program from ending. Raises what action does, and Unreadable after that time."""
    done = begin(action)
    try:
        return done.result(seconds)
    except futures.TimeoutError:
        if done.done():
            raise
        raise Unreadable(f"no whole answer in {seconds:g} seconds") from None


def words(choice: Choice) -> str:
    """What the first choice of an answer says, cut at 1000 letters; raises Unreadable."""
    content = choice.message.content or ""
    if not isinstance(content, str):
        raise Unreadable("an answer whose content is no text")
    content = content.encode(
        errors="replace"
    ).decode()  # half a letter, in JSON, could not be sent back
    return content if len(content) <= 1000 else f"{content[:1000]}..."


def chances(choice: Choice) -> dict[int, float]:
    """{digit: probability} in the first choice of an answer; raises NoChances."""
    if not (choice.logprobs and choice.logprobs.content):
        raise NoChances
    return digits(
        (token.token, math.exp(token.logprob)) for token in choice.logprobs.content[0].top_logprobs
    )


def sent(talk: Talk) -> Talk:
    """A conversation as the protocol has it: pictures inline, as JPEG of the best quality that is
    still small."""
    return [
        {
            **message,
            "content": [
                inline(part) if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in talk
    ]


def inline(part: dict) -> dict:
    """A picture as the protocol has it."""
    file = io.BytesIO()
    part["image"].save(file, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def key() -> dict[str, str]:
    """The key in OPENAI_API_KEY; servers of one's own seldom ask for one. Raises InputError."""
    given = os.environ.get("OPENAI_API_KEY")
    if given and not (given.isascii() and given.isprintable()):
        raise InputError(
            "reward judge: OPENAI_API_KEY has letters that no key has: is there a line break in it?"
        )
    return {} if given else {"api_key": "none"}
