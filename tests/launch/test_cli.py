"""Exit codes and error lines shared by all commands."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from tqdm import tqdm

from launch import cli


def define(f):
    flags.DEFINE_integer("count", 3, "how many", flag_values=f)
    flags.DEFINE_multi_string("name", [], "whom to greet", flag_values=f)


def run(argv, main=lambda f: None):
    return cli.run(define, main, argv)


def raising(error):
    def main(f):
        raise error

    return main


def the_error_line(capsys):
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.strip()


def test_flags_reach_main_and_defaults_come_back_in_the_next_run():
    seen = []
    assert run(["--count=5", "--name=a", "--name=b"], lambda f: seen.append((f.count, f.name))) == 0
    assert run([], lambda f: seen.append((f.count, f.name))) == 0
    assert seen == [(5, ["a", "b"]), (3, [])]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont=3"], "error: unknown flag 'cuont'. Did you mean: count ?"),
        (["--count=x"], "error: flag --count=x: invalid literal for int() with base 10: 'x'"),
        (["extra"], "error: unexpected argument 'extra'; flags are written --name=value"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(argv, message, capsys):
    assert run(argv) == 2
    assert the_error_line(capsys) == message


def raised_in(module):
    """A function of that module that raises a ValueError with a message of two lines."""
    names = {"__name__": module}
    exec("def fail():\n    raise ValueError('first\\n  second')", names)
    return names["fail"]


def test_our_own_value_error_is_one_line_even_if_its_message_has_several(capsys):
    fail = raised_in("kvjax.somewhere")
    assert run([], lambda f: fail()) == 2
    assert the_error_line(capsys) == "error: first second"
    assert run([], lambda f: raised_in("kvjaxes")()) == 1


@pytest.mark.parametrize(
    "bug", [TypeError("a bug"), KeyError("a bug"), RuntimeError("a bug"), OSError("a bug")]
)
def test_a_bug_keeps_its_traceback_and_exit_code_1(bug, capsys):
    assert run([], raising(bug)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "a bug" in err


def test_a_value_error_out_of_a_library_is_a_bug(capsys):
    assert run([], lambda f: np.zeros(3).reshape(2, 2)) == 1
    assert "cannot reshape" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_named(capsys, tmp_path):
    def main(f):
        (tmp_path / "absent").read_text()

    assert run([], main) == 2
    assert the_error_line(capsys) == f"error: {tmp_path / 'absent'}: No such file or directory"


def test_too_little_device_memory_tells_the_bytes_asked_for(capsys):
    assert run([], lambda f: jnp.zeros((1 << 46,), jnp.float32).block_until_ready()) == 2
    assert the_error_line(capsys) == f"error: not enough memory: asked for {1 << 48} bytes (262144.00 GiB)"


def test_too_little_host_memory_is_one_line(capsys):
    assert run([], lambda f: np.zeros((1 << 60,), np.float32)) == 2
    assert "not enough memory: Unable to allocate 4.00 EiB" in the_error_line(capsys)


def test_an_interruption_is_one_line(capsys):
    assert run([], raising(KeyboardInterrupt())) == 130
    assert the_error_line(capsys) == "error: interrupted"


def test_help_names_every_flag_with_its_default(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Exit codes and error lines")
    assert "--count=3" in out
    assert "--name  " in out
    assert "repeat this option" not in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from launch import cli; " + (
        "sys.exit(cli.run(lambda f: None, lambda f: [print('x' * 99) for _ in range(99999)], []))"
    )
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_an_error_has_a_line_of_its_own_after_a_progress_bar(capsys):
    fail = raised_in("kvjax.somewhere")

    def main(f):
        with tqdm(total=3, desc="compiling"):
            fail()

    assert run([], main) == 2
    assert capsys.readouterr().err.replace("\r", "\n").splitlines()[-1] == "error: first second"
    assert not list(tqdm._instances)
    # Not closed by a `with`: an iteration that an error left.
    kept = iter(tqdm(range(3), desc="kernels"))
    next(kept)
    assert run([], lambda f: fail()) == 2
    assert capsys.readouterr().err.replace("\r", "\n").splitlines()[-1] == "error: first second"
