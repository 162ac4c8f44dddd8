#!/usr/bin/env bash
# Trains on one machine with GPUs, this one or one reached over ssh. One process drives all GPUs.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/machine.sh
source "$here/machine.sh"

usage() {
  cat << END
usage: launch/gpu_node.sh --name NAME --config FILE --workdir FOLDER [--host HOST] [options] [-- OVERRIDES]

Starts the run in the background, so that it outlives the terminal. With --host, jaxheads is
installed there first; without it, the jaxheads on PATH is run on this machine.

  --host HOST         where to run, as ssh takes it: [USER@]NAME
$MACHINE_OPTIONS
                      (both only with --host)
$COMMON_OPTIONS
END
}

host=''
split_words "$@"
set -- ${words[@]+"${words[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --host) host=$(value "$@"); shift 2 ;;
    --source) source_from=$(value "$@"); shift 2 ;;
    --model-package) model_package=$(value "$@"); shift 2 ;;
    *) common_option "$@"; shift "$taken" ;;
  esac
done

if [ -n "$host" ]; then
  match --host "$host" '([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*' '[USER@]NAME'
  needs ssh 'install OpenSSH'
elif [ "$source_from$model_package" != "$ROOT" ]; then
  fail '--source and --model-package are for --host: here the jaxheads on PATH runs'
fi
[ "$action" = list ] || check_name

# there COMMAND ...: the plan that the command prints, or that plan for a shell on the host.
there() {
  if [ -n "$host" ]; then printf '%s\n' "ssh $host bash -s <<'END'" "$("$@")" END; else "$@"; fi
}

follow() {
  if [ -n "$host" ]; then
    echo "ssh $host tail -n 100 -F jaxheads/$name/train.log"
  else
    printf '%s\n' "tail -n 100 -F ~/jaxheads/$name/train.log"
  fi
}

start_there() {
  trainer .venv/bin/jaxheads config.toml ''
  stage cuda12
  cat << PLAN
ssh $host 'mkdir -p jaxheads/$name'
scp "\$stage"/* $host:jaxheads/$name/
ssh $host 'bash jaxheads/$name/install.sh'
ssh $host 'bash jaxheads/$name/start.sh'
PLAN
}

case $action in
  start)
    check_run
    if [ -n "$host" ]; then
      [[ $workdir == /* ]] || check_bucket "an absolute path on $host, or gs://BUCKET/FOLDER"
      check_source
      carry_out start_there
    else
      needs jaxheads 'activate its environment, or give --host'
      trainer jaxheads "$config" ''
      carry_out start_lines
    fi
    ;;
  list) carry_out there list_lines ;;
  logs) carry_out follow ;;
  delete) carry_out there stop_lines ;;
esac
