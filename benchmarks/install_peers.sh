#!/usr/bin/env bash
# benchmarks/install_peers.sh PYTHON: installs the libraries that fastmeta is compared with, into
# the environment of that interpreter, which must already have torch. No torch is installed or
# changed. What cannot be installed is shown by the benchmarks as "not installed".
set -euo pipefail
python=${1:?usage: benchmarks/install_peers.sh PYTHON}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

pip install -q -c "$here/../constraints.txt" jax pytest pytest-benchmark
pip install -q -c "$here/../constraints.txt" higher==0.2.1 torchopt==0.7.3

# learn2learn 0.2.0 has no wheel, and its Cython sources no longer compile. MAML needs none of them:
# its own files are installed, without the data sets and environments that the package imports.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# pip would build its metadata, which fails; the archive is all that is wanted
pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$work" learn2learn==0.2.0
tar xzf "$work"/learn2learn-0.2.0.tar.gz -C "$work"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/learn2learn
from=$work/learn2learn-0.2.0/learn2learn
mkdir -p "$site/algorithms" "$site/utils"
cp "$from/_version.py" "$site/"
cp "$from/algorithms/maml.py" "$from/algorithms/base_learner.py" "$site/algorithms/"
cp "$from/utils/__init__.py" "$site/utils/"
echo 'from learn2learn._version import __version__' >"$site/__init__.py"
: >"$site/algorithms/__init__.py"
"$python" -W ignore -c 'import higher, jax, torchopt, learn2learn.algorithms.maml'
