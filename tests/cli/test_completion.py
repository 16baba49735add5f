"""What bash and zsh complete, asked of the shells themselves."""

import shutil
import subprocess
import sys

import pytest

CODE = (
    "import sys; from peft_tsd_command import main; sys.argv = ['peft-tsd', '--print-completion', {shell!r}]; main()"
)


def script(shell: str) -> str:
    done = subprocess.run([sys.executable, "-c", CODE.format(shell=shell)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """What bash offers after the words of a line, the last of which is begun."""
    if shutil.which("bash") is None:
        pytest.skip("no bash on PATH")
    place = tmp_path_factory.mktemp("bash")
    (place / "my.yaml").touch()
    (place / "mine").mkdir()
    (place / "script").write_text(script("bash"))

    def offered(*words: str) -> set[str]:
        line = ["peft-tsd", *words]
        ask = (
            f"source ./script; COMP_WORDS=({' '.join(f'{word!r}' for word in line)}); COMP_CWORD={len(words)}; "
            'COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}; complete -p peft-tsd >/dev/null || exit 1; '
            "_shtab_peft_tsd; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", ask], cwd=place, capture_output=True, text=True)
        return {answer.strip() for answer in done.stdout.splitlines()} - {""}

    return offered


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (("",), {"train", "compare", "evaluate", "export", "explore", "recipes"}),
        (("ex",), {"export", "explore"}),
        (("explore", "--num"), {"--num-directions"}),
        (("train", "smollm2-f"), {"smollm2-family"}),
        (("train", "m"), {"my.yaml", "mine", "minilm-glue"}),
        (("recipes", "show", "minilm-s"), {"minilm-syllogism"}),
        (("recipes", "check", "minilm-s"), {"minilm-syllogism"}),
        (("export", "mi"), {"mine"}),
    ],
)
def test_bash(bash, words, some):
    found = bash(*words)
    assert some <= found
    assert all(answer.startswith(words[-1]) for answer in found)


def test_zsh_reads_the_script(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("no zsh on PATH (Debian: apt-get install zsh)")
    (tmp_path / "_peft-tsd").write_text(script("zsh"))
    ask = (
        "fpath=($PWD $fpath); autoload -U compinit && compinit -u -D; print found $_comps[peft-tsd]; "
        "source ./_peft-tsd; whence -w _shtab_peft_tsd"
    )
    done = subprocess.run(["zsh", "-f", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert "found _peft-tsd" in done.stdout, done.stderr
    assert "_shtab_peft_tsd: function" in done.stdout, done.stderr
    assert "smollm2-family" in script("zsh")


def test_nothing_else_is_loaded():
    code = CODE.format(shell="zsh").removesuffix("main()") + (
        "\ntry: main()\nfinally: print([n for n in ('torch', 'peft') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_another_shell_is_refused():
    done = subprocess.run([sys.executable, "-c", CODE.format(shell="fish")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'fish'" in done.stderr
