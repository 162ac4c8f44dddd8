# Shared by the launchers: options, checks, quoting, and the plan that is printed or run.
#
# A launcher turns its options into a plan, which is a bash script on its standard output.
# --dry-run prints that script; without it the same script is handed to bash. So what is printed is
# what runs, and a printed plan can be kept, changed and run by hand.
#
# Works with bash 3.2 (macOS) and newer.
# shellcheck shell=bash
# shellcheck disable=SC2034  # the launchers read the variables that the options set here

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
COORDINATOR_PORT=8476

action=start
dry_run=no
name=''
config=''
workdir=''
mesh=()
overrides=()

COMMON_OPTIONS="  --name NAME         the run: 1 to 40 of a-z, 0-9 and '-', a letter first
  --config FILE       the TOML file of the run, on this machine
  --workdir FOLDER    where checkpoints and results go; the same folder resumes the run
  --mesh.data N, --mesh.fsdp N, --mesh.sequence N, --mesh.tensor N
                      sizes of the mesh's axes, passed on to the trainer
  -- ...              everything after it is passed on to jaxheads train

Instead of starting the run:
  --list              list the runs here
  --logs              follow the log of the run
  --delete            stop and remove the run; the work folder stays

  --dry-run           print the commands of any of these as a bash script, and run nothing
  --help              print this"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# match OPTION VALUE REGEX EXPECTED: the value is all of the extended regular expression.
match() {
  [ -n "$2" ] || fail "$1 is missing: expected $4"
  local pattern="^($3)$"
  [[ $2 =~ $pattern ]] || fail "$1 is '$2': expected $4"
}

count() { match "$1" "$2" '[1-9][0-9]{0,5}' 'a whole number from 1 on'; }

# One line of text: the plan holds values in here-documents, which a line break could end.
one_line() {
  [[ $2 != *[[:cntrl:]]* ]] || fail "$1 holds a line break or another control character"
}

choose_action() {
  [ "$action" = start ] || fail "--$action and $1 exclude each other: give one"
  action=${1#--}
}

# Splits --option=value before a lone -- into two words; the result is in the array `words`.
split_words() {
  words=()
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        words+=("$@")
        return
        ;;
      --*=*) words+=("${1%%=*}" "${1#*=}") ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

# value OPTION [VALUE ...]: prints the option's value.
value() {
  if [ $# -lt 2 ] || [[ $2 == --* ]]; then fail "$1 needs a value"; fi
  one_line "$1" "$2"
  printf '%s' "$2"
}

# Takes an option that every launcher has off the front of its arguments; `taken` says how many
# words it was.
common_option() {
  taken=1
  case $1 in
    --name | --config | --workdir)
      local given
      given=$(value "$@")
      printf -v "${1#--}" '%s' "$given"
      taken=2
      ;;
    --mesh.data | --mesh.fsdp | --mesh.sequence | --mesh.tensor)
      local size
      size=$(value "$@")
      [ "$1 $size" = '--mesh.data -1' ] || count "$1" "$size"
      mesh+=("$1" "$size")
      taken=2
      ;;
    --list | --logs | --delete) choose_action "$1" ;;
    --dry-run) dry_run=yes ;;
    --help)
      usage
      exit 0
      ;;
    --)
      taken=$#
      shift
      overrides=("$@")
      ;;
    -*) fail "unknown option '$1'; --help lists them" ;;
    *) fail "'$1' is no option; what goes to jaxheads train follows --" ;;
  esac
}

check_name() {
  match --name "$name" '[a-z]|[a-z][a-z0-9-]{0,38}[a-z0-9]' \
    "1 to 40 of a-z, 0-9 and '-', a letter first, no '-' last"
}

# Every run: a name, a configuration that exists, a place for results.
check_run() {
  check_name
  [ -n "$config" ] || fail '--config is missing: expected a TOML file on this machine'
  [ -f "$config" ] || fail "--config is '$config': expected a TOML file on this machine"
  [ -n "$workdir" ] || fail '--workdir is missing: expected a folder for checkpoints and results'
  local word
  for word in ${overrides[@]+"${overrides[@]}"}; do one_line 'what follows --' "$word"; done
}

check_bucket() {
  match --workdir "$workdir" 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/.*)?' "$1"
}

# check_mesh DEVICES WHAT: finds a mesh that cannot fit before anything queues for machines.
check_mesh() {
  local product=1 data='' i
  for ((i = 0; i < ${#mesh[@]}; i += 2)); do
    [ "${mesh[i]} ${mesh[i + 1]}" != '--mesh.data -1' ] || continue
    [ "${mesh[i]}" != --mesh.data ] || data=${mesh[i + 1]}
    product=$((product * mesh[i + 1]))
  done
  if [ $(($1 % product)) -ne 0 ] || { [ -n "$data" ] && [ "$product" -ne "$1" ]; }; then
    fail "the mesh takes $product devices, but $2 are $1"
  fi
}

# quote WORD: prints the word as every shell reads it back.
quote() {
  local safe='^[A-Za-z0-9_@%+=:,./-]+$' escaped="'\\''"
  if [[ $1 =~ $safe ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/$escaped}"; fi
}

# Prints words as one shell command.
command_line() {
  local space='' word
  for word in "$@"; do
    printf '%s' "$space"
    quote "$word"
    space=' '
  done
}

# trainer PROGRAM CONFIG DISTRIBUTED: puts the command that every machine runs into the array
# `train`. An empty DISTRIBUTED is one process that sees all devices.
trainer() {
  train=("$1" train --config "$2" --workdir "$workdir")
  [ -z "$3" ] || train+=(--distributed "$3")
  train+=(${mesh[@]+"${mesh[@]}"} ${overrides[@]+"${overrides[@]}"})
}

# carry_out COMMAND ...: prints the plan that the command prints, or runs it, each line shown as it
# is reached. The plan is complete before any of it runs.
carry_out() {
  local plan
  plan=$("$@")
  plan="#!/usr/bin/env bash
set -euo pipefail
$plan"
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$plan"
  else
    bash -v <(printf '%s\n' "$plan")
  fi
}

# needs PROGRAM WHAT: a real run stops here when the program is not installed.
needs() {
  [ "$dry_run" = yes ] || command -v "$1" > /dev/null || fail "$1 is not on PATH: $2"
}
