# Sourced by speedrun.sh and tests/run.sh: makes .venv with what pyproject.toml asks for, and activates it.
# EXTRA names an optional group of dependencies to install as well as `program`.
# Installs again only when pyproject.toml has changed since.
# NANOCHAT_PYTHON names the Python of an environment that has what is needed: it is used, and nothing is installed.

if [ -n "${NANOCHAT_PYTHON:-}" ]; then
    _given=$(type -P "$NANOCHAT_PYTHON") || { echo "error: NANOCHAT_PYTHON is $NANOCHAT_PYTHON, which is no program" >&2; exit 2; }
    NANOCHAT_PYTHON=$_given # a path: "python" would be the function below
    python() { "$NANOCHAT_PYTHON" "$@"; }
    return 0
fi

_extra="${EXTRA:-}"
_stop() { echo "error: $*" >&2; exit 2; }

if [ ! -x .venv/bin/python ]; then
    _python=""
    for _candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$_candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then
            _python="$_candidate"
            break
        fi
    done
    [ -n "$_python" ] || _stop "no Python 3.10 to 3.14 was found; install one (python3 and its venv module), then call again"
    rm -rf .venv.new
    "$_python" -m venv .venv.new || { rm -rf .venv.new; _stop "$_python cannot make a virtual environment; install its venv module (Debian: python3-venv)"; }
    # A virtual environment knows its own path, so it is made again in its place once we know that it can be.
    rm -rf .venv.new .venv
    "$_python" -m venv .venv || _stop "no virtual environment could be made in $PWD/.venv"
fi
. .venv/bin/activate

_stamp=".venv/installed${_extra:+-$_extra}"
if ! cmp -s pyproject.toml "$_stamp"; then
    echo "installing what pyproject.toml asks for into .venv (PyTorch is large: minutes on a slow line) …"
    python -m pip install --quiet --disable-pip-version-check -e ".[program${_extra:+,$_extra}]" ||
        _stop "the installation failed (see above); with a network, the same command again goes on"
    cp pyproject.toml "$_stamp"
fi
