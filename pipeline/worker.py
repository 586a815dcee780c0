"""One worker: makes the shards it is told to, and says how it goes. `supervision` starts, feeds and replaces them.

A worker is a process (`python -m pipeline.worker`, one a GPU or core) or, for small jobs, a thread of the driver.
Either talks through a pair of sockets, so that whatever a worker said before it died is still there to be read.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection

import cloudpickle

from pipeline.messages import Beat, Done, Failed, Hopeless, Ready, Report, Task
from pipeline.shard_making import Recipe, ShardMaker
from scorer.console import first_line, log_to_stderr
from scorer.errors import ConfigurationError, CorpusError, HardnessError, ShardError, StorageError

_BEAT_SECONDS = 1.0


class _AbandonedError(BaseException):
    """Ends an attempt in a thread whose supervisor is gone."""


class Worker:
    """Serves one connection until the other end closes it."""

    def __init__(self, connection: Connection, is_process: bool):
        self._connection = connection
        self.is_process = is_process
        self._speaking = threading.Lock()
        self._is_abandoned = False

    def serve(self, recipe: Recipe, threads: int) -> None:
        """Makes up to `threads` shards at a time."""
        with suppress(_AbandonedError):
            try:
                maker = recipe.open()
            except HardnessError as error:
                self.say(Hopeless(error))
            else:
                self.say(Ready())
                self._serve(maker, threads)

    def _serve(self, maker: ShardMaker, threads: int) -> None:
        pool = ThreadPoolExecutor(threads, "shard")
        try:
            while True:
                task: Task = self._connection.recv()
                pool.submit(_Attempt(self, task).run, maker)
        except (EOFError, OSError):
            self._is_abandoned = True
            pool.shutdown(wait=False, cancel_futures=True)

    def say(self, report: Report) -> None:
        """Tells the supervisor; where it is gone, nothing is left to work for."""
        try:
            with self._speaking:
                self._connection.send(report)
        except OSError:
            self.abandon()

    def abandon(self) -> None:
        """Ends a worker process at once, or the attempt of a thread."""
        if self.is_process:
            sys.stderr.flush()
            os._exit(1)
        raise _AbandonedError

    def go_on(self) -> None:
        """Ends the attempt that calls if nobody asks for it any more."""
        if self._is_abandoned:
            self.abandon()


class _Attempt:
    """One shard in the making, and what was last said of it."""

    def __init__(self, worker: Worker, task: Task):
        self._worker = worker
        self._task = task
        self._place = ""
        self._blocks = 0
        self._said = 0.0

    def run(self, maker: ShardMaker) -> None:
        """Makes the shard, and reports whatever comes of it."""
        with suppress(_AbandonedError):
            self._make(maker)

    def _make(self, maker: ShardMaker) -> None:
        say = self._worker.say
        try:
            say(Done(maker.make(self._task.split, self._task.careful, self._at, self._done)))
        except (ConfigurationError, StorageError) as error:
            say(Hopeless(error))
        except (ShardError, CorpusError) as error:
            say(self._failed(error, is_final=True))
        except (HardnessError, OSError) as error:
            say(self._failed(error))
        except _AbandonedError:
            raise
        except BaseException as error:  # a panic of the tokenizer's is no Exception
            traceback.print_exc()
            # It may have left the device or the tokenizer in any state: a fresh process goes on, if there can be one.
            say(self._failed(error, is_last=self._worker.is_process))
            if self._worker.is_process:
                self._worker.abandon()

    def _failed(self, error: BaseException, is_final: bool = False, is_last: bool = False) -> Failed:
        message = str(error) if isinstance(error, HardnessError) else f"{type(error).__name__}: {first_line(error)}"
        return Failed(self._task.split.index, message, self._place, is_final, is_last)

    def _at(self, place: str) -> None:
        self._place = place
        self._beat()

    def _done(self, blocks: int) -> None:
        self._blocks = blocks
        self._worker.go_on()
        if time.monotonic() - self._said > _BEAT_SECONDS:
            self._beat()

    def _beat(self) -> None:
        self._said = time.monotonic()
        self._worker.say(Beat(self._task.split.index, self._place, self._blocks))


def main() -> None:
    """A worker process: takes its recipe from the connection, and ends with it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.worker", allow_abbrev=False)
    parser.add_argument("--connection", type=int, required=True, help="file descriptor of a socket to the supervisor")
    parser.add_argument("--threads", type=int, required=True, help="shards at a time")
    flags = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    log_to_stderr()
    connection = Connection(flags.connection)
    try:
        recipe: Recipe = cloudpickle.loads(connection.recv_bytes())
    except EOFError:
        return
    Worker(connection, is_process=True).serve(recipe, flags.threads)
    sys.stderr.flush()
    os._exit(0)  # without waiting for shards in the making, which nobody asks for any more


if __name__ == "__main__":
    main()
