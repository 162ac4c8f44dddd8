#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: creates it, installs on every worker, starts the run there.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/machine.sh
source "$here/machine.sh"

usage() {
  cat << END
usage: launch/tpu_pod.sh --name NAME --zone ZONE --accelerator TYPE --version VERSION
                         --config FILE --workdir gs://BUCKET/FOLDER [options] [-- OVERRIDES]

Creates a TPU slice, installs jaxheads on all its workers and starts the run on each of them.

  --zone ZONE         for instance us-west4-a
  --accelerator TYPE  for instance v5litepod-16
  --version VERSION   the TPU software, for instance v2-alpha-tpuv5-lite
  --project PROJECT   if it is not gcloud's own
  --queued            ask for the slice through a queued resource, and wait for it
  --spot              the same for spot capacity, which may be taken away
  --reuse             the slice is there already: only install and start
  --worker N|all      whose log --logs follows (default: 0)
$MACHINE_OPTIONS
$COMMON_OPTIONS
END
}

zone='' accelerator='' version='' project='' queued=no spot=no reuse=no worker=0
split_words "$@"
set -- ${words[@]+"${words[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --zone) zone=$(value "$@"); shift 2 ;;
    --accelerator) accelerator=$(value "$@"); shift 2 ;;
    --version) version=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --worker) worker=$(value "$@"); shift 2 ;;
    --source) source_from=$(value "$@"); shift 2 ;;
    --model-package) model_package=$(value "$@"); shift 2 ;;
    --queued) queued=yes; shift ;;
    --spot) spot=yes; queued=yes; shift ;;
    --reuse) reuse=yes; shift ;;
    *) common_option "$@"; shift "$taken" ;;
  esac
done

match --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-west4-a'
where="--zone=$zone"
if [ -n "$project" ]; then
  match --project "$project" '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' 'a project id'
  where+=" --project=$project"
fi
[ "$action" = list ] || check_name
needs gcloud 'install the Google Cloud CLI'
tpu='gcloud compute tpus tpu-vm'
queue='gcloud compute tpus queued-resources'

create_slice() {
  local spot_flag=''
  [ "$spot" = no ] || spot_flag=' --spot'
  if [ "$queued" = no ]; then
    echo "$tpu create $name $where --accelerator-type=$accelerator --version=$version"
    return
  fi
  cat << PLAN
$queue create $name --node-id=$name $where --accelerator-type=$accelerator --runtime-version=$version$spot_flag
while true; do
  state=\$($queue describe $name $where --format='value(state.state)')
  case \$state in
    ACTIVE) break ;;
    FAILED | SUSPEND*) echo "error: the queued resource $name is \$state; --delete removes it" >&2 && exit 1 ;;
  esac
  echo "$name: \$state"
  sleep 30
done
PLAN
}

start() {
  # TPU hosts find each other: JAX needs no address.
  trainer .venv/bin/jaxheads config.toml auto
  stage tpu
  [ "$reuse" = yes ] || create_slice
  cat << PLAN
$tpu ssh $name $where --worker=all --command='mkdir -p jaxheads/$name'
$tpu scp "\$stage"/* $name:jaxheads/$name/ $where --worker=all
$tpu ssh $name $where --worker=all --command='bash jaxheads/$name/install.sh'
$tpu ssh $name $where --worker=all --command='bash jaxheads/$name/start.sh'
PLAN
}

case $action in
  start)
    check_run
    match --accelerator "$accelerator" 'v[0-9]+[a-z]*-[0-9]+' 'a type such as v5litepod-16'
    match --version "$version" '[a-z0-9.-]+' 'a TPU software version such as v2-alpha-tpuv5-lite'
    # Every worker writes its shards of one checkpoint, so all must see the same folder.
    [[ $workdir == /* ]] || check_bucket \
      'gs://BUCKET/FOLDER, or an absolute path on storage that all workers share'
    check_source
    carry_out start
    ;;
  list)
    carry_out printf '%s\n' "$queue list $where" "$tpu list $where"
    ;;
  logs)
    match --worker "$worker" 'all|0|[1-9][0-9]*' "a worker's number, or all"
    carry_out echo \
      "$tpu ssh $name $where --worker=$worker --command='tail -n 100 -F jaxheads/$name/train.log'"
    ;;
  delete)
    if [ "$queued" = yes ]; then
      carry_out echo "$queue delete $name $where --force --quiet"
    else
      carry_out echo "$tpu delete $name $where --quiet"
    fi
    ;;
esac
