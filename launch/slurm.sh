#!/usr/bin/env bash
# Trains on a Slurm cluster with GPUs: one process per node, or one per GPU.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << END
usage: launch/slurm.sh --name NAME --nodes N --gpus-per-node N --time TIME
                       --config FILE --workdir FOLDER [options] [-- OVERRIDES]

Submits a batch job. Run it where the job shall run: FILE, FOLDER and the log, NAME.log, are taken
from this folder, which the nodes must see too. Before its time is over the job saves, and goes
back into the queue; it goes on from there.

  --nodes N           how many nodes
  --gpus-per-node N   how many GPUs of each
  --cpus-per-gpu N    CPU cores for every GPU (default: 8)
  --processes MODE    node: one process drives all GPUs of a node (default); gpu: one process each
  --time TIME         limit of the job, [DAYS-]HOURS:MINUTES:SECONDS
  --partition NAME, --account NAME
                      as sbatch takes them
  --venv FOLDER       environment that holds jaxheads (default: the jaxheads on PATH)
  --setup FILE        a file to source first, for instance one with module load lines
$COMMON_OPTIONS
END
}

nodes='' gpus='' cpus=8 processes=node time='' partition='' account='' venv='' setup=''
split_words "$@"
set -- ${words[@]+"${words[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=$(value "$@"); shift 2 ;;
    --gpus-per-node) gpus=$(value "$@"); shift 2 ;;
    --cpus-per-gpu) cpus=$(value "$@"); shift 2 ;;
    --processes) processes=$(value "$@"); shift 2 ;;
    --time) time=$(value "$@"); shift 2 ;;
    --partition) partition=$(value "$@"); shift 2 ;;
    --account) account=$(value "$@"); shift 2 ;;
    --venv) venv=$(value "$@"); shift 2 ;;
    --setup) setup=$(value "$@"); shift 2 ;;
    *) common_option "$@"; shift "$taken" ;;
  esac
done

check_slurm() {
  check_run
  count --nodes "$nodes"
  count --gpus-per-node "$gpus"
  count --cpus-per-gpu "$cpus"
  match --processes "$processes" 'node|gpu' 'node or gpu'
  match --time "$time" '([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}' '[DAYS-]HOURS:MINUTES:SECONDS'
  [ -z "$partition" ] || match --partition "$partition" '[A-Za-z0-9_.,-]+' 'names of partitions'
  [ -z "$account" ] || match --account "$account" '[A-Za-z0-9_.-]+' 'the name of an account'
  [ -z "$venv" ] || [ -x "$venv/bin/jaxheads" ] ||
    fail "--venv is '$venv': expected an environment with bin/jaxheads"
  [ -z "$setup" ] || [ -f "$setup" ] || fail "--setup is '$setup': expected an existing file"
  [[ $workdir == gs://* || $workdir != *://* ]] ||
    fail "--workdir is '$workdir': expected a folder that all nodes share, or gs://BUCKET/FOLDER"
  check_mesh $((nodes * gpus)) "$nodes x $gpus GPUs"
}

# --gres, not --gpus-per-task: every process must see all GPUs of its node and choose its own.
directives() {
  cat << END
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gres=gpu:$gpus
#SBATCH --cpus-per-task=$task_cpus
#SBATCH --time=$time
END
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  cat << END
#SBATCH --output=$name.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
END
}

# Five minutes before the limit Slurm sends USR1 to this script only. It passes SIGTERM on, on which
# the trainer saves and exits, and queues the job again. A job that is cancelled, or that ends by
# itself, is not queued again; one that is preempted Slurm queues again by --requeue.
batch_script() {
  local tasks=1 task_cpus=$((cpus * gpus)) program=jaxheads
  if [ "$processes" = gpu ]; then tasks=$gpus task_cpus=$cpus; fi
  [ -z "$venv" ] || program=$venv/bin/jaxheads
  trainer "$program" "$config" slurm
  printf '%s\n' '#!/usr/bin/env bash' "$(directives)" 'set -euo pipefail'
  [ -z "$setup" ] || printf '%s\n' '# shellcheck source=/dev/null' "source $(quote "$setup")"
  # srun stopped taking over --cpus-per-task from the job with Slurm 22.05.
  cat << END
srun --kill-on-bad-exit=1 --cpus-per-task=$task_cpus $(command_line "${train[@]}") &
step=\$!
again=no
trap 'again=yes; kill -TERM "\$step" || true' USR1
code=0
wait "\$step" || code=\$?
if [ "\$again" = yes ]; then
  wait "\$step" || code=\$? # The signal ended the first wait; this one is for the trainer to save.
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
}

case $action in
  start)
    check_slurm
    needs sbatch 'run this on a login node of the cluster'
    carry_out printf '%s\n' "sbatch <<'END'" "$(batch_script)" END
    ;;
  list)
    needs squeue 'run this on a login node of the cluster'
    # shellcheck disable=SC2016  # the plan reads USER
    carry_out echo 'squeue --user="$USER" --format="%.12i %.40j %.10T %.12M %.12l %.6D %R"'
    ;;
  logs)
    check_name
    carry_out echo "tail -n 100 -F $name.log"
    ;;
  delete)
    check_name
    needs scancel 'run this on a login node of the cluster'
    carry_out echo "scancel --user=\"\$USER\" --name=$name"
    ;;
esac
