# Sourced by the training scripts: `launch COMMAND DEFAULT_CONFIG [CONFIG] [section.key=value ...]` runs one command of
# llava-pdrop in the world it finds, which is the first of these that is there:
#
#   Slurm job of several nodes    srun starts one torchrun per node (see slurm.sbatch)
#   HOSTFILE=FILE                 the deepspeed launcher, with a hostfile as DeepSpeed has it
#   NNODES, NODE_RANK, MASTER_ADDR    torchrun on this node, which is started by hand on every node
#   several GPUs                  torchrun on this machine
#   one GPU or none               one process
#
#   NPROC_PER_NODE    processes per node; default: the GPUs this job may use, at least 1 (1 for configs/tiny/, which run
#                     on the CPU)
#   MASTER_PORT       default: 29500
#   TORCHRUN_ARGS     more arguments for torchrun
#   DRY_RUN=1         prints the command and what it would find in the environment, and starts nothing
# shellcheck shell=bash disable=SC2154  # ROOT, python and fail come from environment.sh

gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        local list="${CUDA_VISIBLE_DEVICES//,/ }"
        [[ "$list" != "-1" ]] || list=""
        wc -w <<<"$list"
    elif [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
        printf '%s\n' "$SLURM_GPUS_ON_NODE"
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

launch() {
    local command="$1" config="$2" processes nodes
    shift 2
    if [[ $# -gt 0 && "$1" != *=* && "$1" != -* ]]; then
        config="$1"
        shift
    fi
    # A path is meant from where the user stands; the paths inside configs are meant from the checkout.
    if [[ "$config" != /* && -e "$config" ]]; then config="$(pwd)/$config"; fi
    config="${config#"$ROOT"/}"
    cd "$ROOT" || fail "$ROOT is gone"

    processes="$(gpus)"
    if [[ "/$config" == */configs/tiny/* ]]; then processes=1; fi
    processes="${NPROC_PER_NODE:-$((processes > 1 ? processes : 1))}"
    nodes="${NNODES:-1}"
    local port="${MASTER_PORT:-29500}" more=() torchrun=("$python" -m torch.distributed.run --nproc-per-node "$processes")
    [[ -z "${TORCHRUN_ARGS:-}" ]] || read -r -a more <<<"$TORCHRUN_ARGS"
    local work=(-m llava_pdrop "$command" "$config" "$@")

    if [[ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]]; then
        local hosts
        hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is not set, though SLURM_JOB_NUM_NODES is}")"
        start srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 \
            --kill-on-bad-exit=1 "${torchrun[@]}" --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-backend c10d \
            --rdzv-endpoint "${hosts%%$'\n'*}:$port" --rdzv-id "${SLURM_JOB_ID:-llava_pdrop}" ${more[@]+"${more[@]}"} "${work[@]}"
    elif [[ -n "${HOSTFILE:-}" ]]; then
        [[ -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE does not exist: one line per node, such as 'node1 slots=8'"
        start "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$port" \
            --module llava_pdrop "$command" "$config" "$@"
    elif [[ "$nodes" -gt 1 ]]; then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
            fail "NNODES=$nodes also needs NODE_RANK (0 to $((nodes - 1)), another one on every node) and MASTER_ADDR"
        start "${torchrun[@]}" --nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
            --master-port "$port" ${more[@]+"${more[@]}"} "${work[@]}"
    elif [[ "$processes" -gt 1 || "${#more[@]}" -gt 0 ]]; then
        [[ "${#more[@]}" -gt 0 ]] || more=(--standalone)
        start "${torchrun[@]}" "${more[@]}" "${work[@]}"
    else
        start "$python" "${work[@]}"
    fi
}

# Runs the command in place of this script, or prints it. SIGUSR1 (save and stop, see slurm.sbatch) would end a launcher;
# it is ignored by all that is started here but the training processes, which listen to it.
start() {
    trap '' USR1
    if [[ -z "${DRY_RUN:-}" ]]; then exec "$@"; fi
    local name
    for name in MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ GOMP_SPINCOUNT TOKENIZERS_PARALLELISM \
        CUDA_VISIBLE_DEVICES NCCL_DEBUG NCCL_SOCKET_IFNAME OMP_NUM_THREADS HF_HOME WANDB_MODE; do
        if [[ -n "${!name+set}" ]]; then printf '%s=%q\n' "$name" "${!name}"; fi
    done
    printf '%q ' "$@"
    printf '\n'
}
