#!/usr/bin/env bash
# Trains on a GKE cluster: a JobSet of one pod per node, with TPUs or GPUs.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << END
usage: launch/gke.sh --name NAME --image IMAGE --accelerator TYPE (--topology AxB[xC] | --nodes N)
                     --config FILE --workdir gs://BUCKET/FOLDER [options] [-- OVERRIDES]

Writes a JobSet and creates it with kubectl. FILE travels in a ConfigMap; jaxheads is in the image
(launch/Dockerfile). When a pod fails or is preempted all restart, and the run goes on from its
newest checkpoint.

  --image IMAGE           image with jaxheads and jax[tpu] or jax[cuda12]
  --accelerator TYPE      the node's label: tpu-v5-lite-podslice, nvidia-h100-80gb, ...
  --topology AxB[xC]      TPUs: the slice, for instance 4x4
  --nodes N               GPUs: how many nodes (default: 1)
  --devices-per-node N    chips or GPUs of a node (default: 4 chips, 8 GPUs)
  --spot                  run on spot nodes
  --restarts N            how often to restart (default: 10)
  --namespace NAMESPACE, --context CONTEXT
                          as kubectl takes them
  --worker N|all          whose log --logs follows (default: 0)
$COMMON_OPTIONS
END
}

image='' accelerator='' topology='' nodes='' devices='' spot=no restarts=10
namespace='' context='' worker=0
split_words "$@"
set -- ${words[@]+"${words[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --image) image=$(value "$@"); shift 2 ;;
    --accelerator) accelerator=$(value "$@"); shift 2 ;;
    --topology) topology=$(value "$@"); shift 2 ;;
    --nodes) nodes=$(value "$@"); shift 2 ;;
    --devices-per-node) devices=$(value "$@"); shift 2 ;;
    --restarts) restarts=$(value "$@"); shift 2 ;;
    --namespace) namespace=$(value "$@"); shift 2 ;;
    --context) context=$(value "$@"); shift 2 ;;
    --worker) worker=$(value "$@"); shift 2 ;;
    --spot) spot=yes; shift ;;
    *) common_option "$@"; shift "$taken" ;;
  esac
done

kubectl=kubectl
if [ -n "$context" ]; then
  match --context "$context" '[A-Za-z0-9@:/._-]+' 'the name of a context'
  kubectl+=" --context=$context"
fi
if [ -n "$namespace" ]; then
  match --namespace "$namespace" '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' 'the name of a namespace'
  kubectl+=" --namespace=$namespace"
fi
[ "$action" = list ] || check_name
needs kubectl 'install it, and connect it to the cluster'

check_tpu() {
  resource=google.com/tpu
  [ -z "$nodes" ] || fail "--nodes is for GPUs: a TPU slice's nodes follow from --topology"
  match --topology "$topology" '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 'a slice such as 4x4 or 2x2x4'
  devices=${devices:-4}
  count --devices-per-node "$devices"
  local chips=$((${topology//x/*}))
  [ $((chips % devices)) -eq 0 ] ||
    fail "--topology $topology has $chips chips, which --devices-per-node $devices does not divide"
  nodes=$((chips / devices))
  check_mesh "$chips" "the chips of $topology"
  distributed=auto
}

check_gpu() {
  resource=nvidia.com/gpu
  [ -z "$topology" ] || fail '--topology is for TPUs: give --nodes for GPUs'
  nodes=${nodes:-1} devices=${devices:-8}
  count --nodes "$nodes"
  count --devices-per-node "$devices"
  check_mesh $((nodes * devices)) "$nodes x $devices GPUs"
  # JobSet names every pod; the first one is the coordinator. Kubernetes fills in PROCESS.
  distributed=''
  # shellcheck disable=SC2016
  [ "$nodes" -eq 1 ] || distributed="$name-train-0-0.$name:$COORDINATOR_PORT,$nodes,"'$(PROCESS)'
}

check_gke() {
  check_run
  match --image "$image" '[A-Za-z0-9][A-Za-z0-9._/:@-]*' 'the name of an image'
  match --restarts "$restarts" '0|[1-9][0-9]{0,5}' 'a whole number'
  check_bucket 'gs://BUCKET/FOLDER, which every pod can reach'
  match --accelerator "$accelerator" '(tpu|nvidia)-[a-z0-9-]+' \
    'a label that starts with tpu- or nvidia-, such as tpu-v5-lite-podslice'
  if [[ $accelerator == tpu-* ]]; then check_tpu; else check_gpu; fi
}

# yaml_list WORD ...: a YAML list of double-quoted strings. Kubernetes expands $(NAME) in them, so
# every $ that the user wrote is doubled; the one word that is meant to expand is $distributed.
yaml_list() {
  local word
  for word in "$@"; do
    [ "$word" = "$distributed" ] || word=${word//\$/\$\$}
    word=${word//\\/\\\\}
    printf '                    - "%s"\n' "${word//\"/\\\"}"
  done
}

# A TPU slice is a whole node pool.
annotations() {
  cat << 'END'
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
END
}

placement() {
  if [ "$resource" = google.com/tpu ]; then
    cat << END
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
END
  else
    echo "                cloud.google.com/gke-accelerator: $accelerator"
  fi
  [ "$spot" = no ] || cat << 'END'
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
END
}

# GPU pods find the driver's libraries where GKE mounts them.
gpu_environment() {
  cat << 'END'
                  env:
                    - {name: LD_LIBRARY_PATH, value: /usr/local/nvidia/lib64}
END
  [ "$nodes" -eq 1 ] || cat << 'END'
                    - name: PROCESS
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
END
}

# NCCL needs more shared memory than the 64 MB that a container has.
volumes() {
  cat << END
                  volumeMounts:
                    - {name: config, mountPath: /etc/jaxheads}
                    - {name: shm, mountPath: /dev/shm}
              volumes:
                - {name: config, configMap: {name: $name}}
                - {name: shm, emptyDir: {medium: Memory}}
END
}

manifest() {
  trainer jaxheads /etc/jaxheads/config.toml "$distributed"
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels:
    app.kubernetes.io/name: jaxheads
END
  [ "$resource" != google.com/tpu ] || annotations
  cat << END
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: $nodes
          completions: $nodes
          backoffLimit: 0
          template:
            metadata:
              labels:
                app.kubernetes.io/name: jaxheads
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
$(placement)
              containers:
                - name: train
                  image: $image
                  command:
$(yaml_list "${train[@]}")
END
  [ "$resource" != nvidia.com/gpu ] || gpu_environment
  cat << END
                  resources:
                    limits:
                      $resource: $devices
END
  volumes
}

# Both commands fail when the run exists: what it reads is not changed under it.
create() {
  cat << PLAN
$kubectl create configmap $name --from-file=config.toml=$(quote "$config")
$kubectl create --filename=- <<'END'
$(manifest)
END
PLAN
}

case $action in
  start)
    check_gke
    carry_out create
    ;;
  list) carry_out echo "$kubectl get jobsets --selector=app.kubernetes.io/name=jaxheads" ;;
  logs)
    match --worker "$worker" 'all|0|[1-9][0-9]*' "a pod's number, or all"
    selector=jobset.sigs.k8s.io/jobset-name=$name
    [ "$worker" = all ] || selector+=,batch.kubernetes.io/job-completion-index=$worker
    carry_out echo \
      "$kubectl logs --selector=$selector --follow --tail=100 --prefix --max-log-requests=1000"
    ;;
  delete)
    carry_out echo "$kubectl delete jobset,configmap $name --ignore-not-found"
    ;;
esac
