"""Commands run in-process on the two-layer embedded model."""

import json

import pytest

from launch import cli

MODEL = "kvref-draft-2m"


class Run:
    """Exit code and output of one command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self):
        """The only line on stderr of a command that refused its input."""
        assert self.code == 2, self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.strip()


@pytest.fixture
def command(capfd):
    """`command(module, *flags)` runs it with the small model unless --model is given."""

    def run(module, *argv):
        if not any(a.startswith("--model") for a in argv):
            argv = (f"--model={MODEL}", *argv)
        capfd.readouterr()
        code = cli.run(module.define, module.main, argv)
        return Run(code, *capfd.readouterr())

    return run
