"""A compile in a child that may be killed: what a grammar costs is known only when it is done.

Comes in: a grammar. Goes out: the text the worker compiles itself, or why it is refused. The child
is a fork of the worker, so it starts in a millisecond and its end takes nothing along.
"""

from __future__ import annotations

import os
import resource
import signal

from llguidance import LLTokenizer

from runtime.grammar.compiler import GrammarError, compile_matcher, grammar_text
from runtime.grammar.messages import WorkerOptions
from runtime.request import Grammar


class Trial:
    """To be started while no other thread of this process is at work."""

    def __init__(self, tokenizer: LLTokenizer, grammar: Grammar, options: WorkerOptions) -> None:
        self._options = options
        self._answer = os.memfd_create("grammar")
        self._pid = os.fork()
        if self._pid == 0:
            _run(tokenizer, grammar, options, self._answer)

    def poll(self) -> str | None:
        """The grammar's text once the child is done; raises GrammarError."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return None
        with os.fdopen(self._answer, "rb") as file:
            file.seek(0)
            answer = file.read()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            raise GrammarError(f"it does not compile within {self._options.seconds:g} s")
        if os.waitstatus_to_exitcode(status) or not answer:
            raise GrammarError(
                f"it is too complex: it does not compile within {self._options.memory >> 20} MiB"
            )
        text = answer[1:].decode()
        if answer[:1] == b"-":
            raise GrammarError(text)
        return text


def _run(tokenizer: LLTokenizer, grammar: Grammar, options: WorkerOptions, answer: int) -> None:
    """The child's life. SIGALRM's default action ends it: no Python code has to run for that."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, options.seconds)
        limit_memory(options.memory)
        os.close(2)  # a library that aborts says so: the parent does
        try:
            text = grammar_text(grammar)
            compile_matcher(tokenizer, text)
            said = "+" + text
        except GrammarError as error:
            said = f"-{error}"
        with os.fdopen(answer, "wb") as file:
            file.write(said.encode())
        code = 0
    finally:
        os._exit(code)


def limit_memory(more: int) -> None:
    """This process may take `more` bytes than now, as far as the limit it has allows."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most, now = used + more, resource.getrlimit(resource.RLIMIT_AS)[0]
    if now != resource.RLIM_INFINITY:
        most = min(most, now)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
