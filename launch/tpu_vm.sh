#!/usr/bin/env bash
# Trains on every worker of an existing TPU VM or queued resource, at a git revision of this
# checkout:
#
#   launch/tpu_vm.sh tpu-vm|queued-resources NAME ZONE \
#     --config=experiments/imagenet256.py --workdir=gs://BUCKET/run
#
# The same command resumes. Environment variables: REVISION, HEAD by default; PROJECT, gcloud's
# default project; PYTHON, the workers' Python 3.11 or later, python3 by default.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ $# -ge 3 ]] ||
  fail "expected launch/tpu_vm.sh tpu-vm|queued-resources NAME ZONE --config=FILE \
--workdir=FOLDER ..., found $# arguments"
kind=$1 name=$2 zone=$3
shift 3
where=("--zone=$zone" --worker=all)
case $kind in
  tpu-vm) ;;
  queued-resources) where+=(--node=all) ;;
  *) fail "the first argument is '$kind': expected tpu-vm or queued-resources" ;;
esac
[[ $name != -* && $zone == *-*-* ]] ||
  fail "NAME ZONE are '$name' '$zone': expected values such as my-slice us-east5-a"
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] ||
  fail "--config=FILE and --workdir=FOLDER are needed after NAME and ZONE"
command -v gcloud > /dev/null || fail "gcloud is not on the PATH: install the Google Cloud CLI"

cd "$(dirname "$0")/.."
revision=$(git rev-parse --short=12 --verify "${REVISION:-HEAD}^{commit}") ||
  fail "REVISION is '${REVISION:-HEAD}': expected a commit of this checkout"
[[ -z $(git status --porcelain) ]] ||
  echo "note: revision $revision is sent, without the uncommitted changes" >&2
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")
folder=ntm_jax-$revision

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
git archive --format=tar.gz --output="$temporary/$folder.tar.gz" "$revision"
gcloud compute tpus "$kind" scp "$temporary/$folder.tar.gz" "$name:" "${where[@]}"

arguments=$(printf ' %q' "$@")
gcloud compute tpus "$kind" ssh "$name" "${where[@]}" --command="set -e
mkdir -p $folder
tar -xzf $folder.tar.gz -C $folder
cd $folder
[ -e .venv/bin/activate ] || ${PYTHON:-python3} -m venv .venv
. .venv/bin/activate
pip install --quiet -c constraints.txt -e '.[tpu]'
exec python -m launch.train$arguments"
