# Sourced by the other scripts: `launch COMMAND DEFAULT_CONFIG [CONFIG] [section.key=value ...]` runs one command of
# llava-pdrop on the GPUs and nodes it detects. The first of these that applies:
#
#   Slurm step of several nodes       (srun bash scripts/...) this task's torchrun, one task per node
#   Slurm job of several nodes        srun starts one torchrun per node (see slurm.sbatch)
#   HOSTFILE=FILE                     the deepspeed launcher, with DeepSpeed's hostfile
#   NNODES, NODE_RANK, MASTER_ADDR    torchrun on this node; start the script by hand on every node
#   several GPUs                      torchrun on this machine
#   one GPU or none                   one process
#
#   NPROC_PER_NODE    processes per node; default: the GPUs of this job, at least 1 (1 for configs/tiny/ and its runs, which
#                     use the CPU). With HOSTFILE: its slots
#   MASTER_PORT       default: 29500
#   TORCHRUN_ARGS     more arguments for torchrun
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT    seconds that torchrun, when stopped, gives the processes to finish their step and save;
#                     default: 600. Before torch 2.12 it is always 30
#   DRY_RUN=1         prints the environment and the command, and starts nothing
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

# count NAME VALUE LEAST: fails unless VALUE is a whole number from LEAST on.
count() {
    [[ "$2" =~ ^[0-9]{1,6}$ && "$((10#$2))" -ge "$3" ]] || fail "$1=$2 must be a whole number, at least $3"
}

# Nodes of the Slurm step that this shell is a task of; 0 outside steps. (A batch script and the shell of salloc are steps
# too, with special ids, but they are not to be spread over nodes.)
step_nodes() {
    case "${SLURM_STEP_ID:-}" in
        "" | 4294967290 | 4294967291) printf '0\n' ;;
        *) printf '%s\n' "${SLURM_STEP_NUM_NODES:-1}" ;;
    esac
}

launch() {
    local command="$1" config="$2" word found="" words=() processes
    shift 2
    for word in "$@"; do # the first word that is neither an option nor key=value is the config
        if [[ -z "$found" && "$word" != -* && ("$word" != *=* || -e "$word") ]]; then
            config="$word" found=1
        else
            words+=("$word")
        fi
    done
    # A path given here is relative to the user's directory; paths inside configs are relative to the checkout.
    if [[ "$config" != /* && -e "$config" ]]; then config="$(pwd)/$config"; fi
    if [[ "${HOSTFILE:-/}" != /* && -e "$HOSTFILE" ]]; then HOSTFILE="$(pwd)/$HOSTFILE"; fi
    config="${config#"$ROOT"/}"
    cd "$ROOT" || fail "$ROOT is gone"

    processes="$(gpus)"
    case "/$config" in
        */configs/tiny/* | */configs/ablations/tiny* | */configs/ablations/presets* | */checkpoints/tiny/*) processes=1 ;;
    esac
    processes="${NPROC_PER_NODE:-$((processes > 1 ? processes : 1))}"
    local nodes="${NNODES:-1}" port="${MASTER_PORT:-29500}" inside more=()
    count NPROC_PER_NODE "$processes" 1
    count NNODES "$nodes" 1
    count MASTER_PORT "$port" 1
    local torchrun=("$python" -m torch.distributed.run --nproc-per-node "$processes")
    [[ -z "${TORCHRUN_ARGS:-}" ]] || read -r -a more <<<"$TORCHRUN_ARGS"
    local work=(-m llava_pdrop "$command" "$config" ${words[@]+"${words[@]}"})
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

    inside="$(step_nodes)"
    if [[ "$inside" -gt 1 || ("$inside" -eq 0 && "${SLURM_JOB_NUM_NODES:-1}" -gt 1) ]]; then
        local hosts step=() list="${SLURM_STEP_NODELIST:-}"
        if [[ "$inside" -eq 0 ]]; then
            nodes="$SLURM_JOB_NUM_NODES" list="${SLURM_JOB_NODELIST:?is not set, though SLURM_JOB_NUM_NODES is}"
            step=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1)
            # Since Slurm 22.05 a step takes one core per task unless it is told what the job has.
            [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || step+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")
            # Slurm resets all signals of its tasks, so the rule of `start` for USR1 is set here again.
            # shellcheck disable=SC2016
            step+=(bash -c 'trap "" USR1; exec "$@"' torchrun)
        else
            nodes="$inside"
            [[ "${SLURM_STEP_NUM_TASKS:-$nodes}" == "$nodes" ]] ||
                fail "srun started $SLURM_STEP_NUM_TASKS tasks on $nodes nodes: give it --ntasks-per-node 1"
        fi
        hosts="$(scontrol show hostnames "$list")"
        torchrun+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${hosts%%$'\n'*}:$port")
        torchrun+=(--rdzv-id "${SLURM_JOB_ID:-llava_pdrop}" ${more[@]+"${more[@]}"})
        start ${step[@]+"${step[@]}"} "${torchrun[@]}" "${work[@]}"
    elif [[ -n "${HOSTFILE:-}" ]]; then
        [[ -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE does not exist: one line per node, such as 'node1 slots=8'"
        start "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$port" \
            --no_local_rank --module llava_pdrop "${work[@]:2}"
    elif [[ "$nodes" -gt 1 ]]; then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
            fail "NNODES=$nodes also needs NODE_RANK (0 to $((nodes - 1)), another one on every node) and MASTER_ADDR"
        count NODE_RANK "$NODE_RANK" 0
        [[ "$NODE_RANK" -lt "$nodes" ]] || fail "NODE_RANK=$NODE_RANK with NNODES=$nodes: ranks are 0 to $((nodes - 1))"
        start "${torchrun[@]}" --nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
            --master-port "$port" ${more[@]+"${more[@]}"} "${work[@]}"
    elif [[ "$processes" -gt 1 || "${#more[@]}" -gt 0 ]]; then
        [[ "${#more[@]}" -gt 0 ]] || more=(--standalone)
        start "${torchrun[@]}" "${more[@]}" "${work[@]}"
    else
        start "$python" "${work[@]}"
    fi
}

# Runs the command in place of this script, or prints it. SIGUSR1 (save and stop, see slurm.sbatch) would end a launcher, so
# everything started here ignores it, except the training processes, which handle it.
start() {
    trap '' USR1
    if [[ -z "${DRY_RUN:-}" ]]; then exec "$@"; fi
    local name
    for name in $(compgen -e); do
        case "$name" in
            *KEY | *TOKEN | *PASSWORD | *SECRET) ;;
            CUDA_* | NCCL_* | GLOO_* | TORCH* | PYTORCH_* | OMP_* | GOMP_* | MALLOC_* | TOKENIZERS_* | HF_* | WANDB_* | \
                SLURM_JOB_* | SLURM_STEP_* | LLAVA_PDROP_* | NNODES | NODE_RANK | MASTER_* | HOSTFILE | NPROC_PER_NODE)
                printf '%s=%q\n' "$name" "${!name}"
                ;;
        esac
    done
    printf '%q ' "$@"
    printf '\n'
}
