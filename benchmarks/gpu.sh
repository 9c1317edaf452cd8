#!/usr/bin/env bash
# Try and measure everything on one GPU, in two parts.
#
#   bash benchmarks/gpu.sh 1     first contact, at most 270 s: attention, a profile, tests, training
#   bash benchmarks/gpu.sh 2     numbers, at most 460 s: other steps, the demo
#   DEVICE=cpu SIZE=tiny bash benchmarks/gpu.sh 1     tries the script itself
#
# OUT (default output/gpu) receives part1.log, part2.log and profile.txt; CLIPS (default .clips) is
# a folder with train.csv and its videos. A failing command stops nothing, but the exit status is 1
# then. What LIMIT, in seconds, leaves no time for is skipped and counts as failed, so the most
# important things come first.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-} DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-large} OUT=${OUT:-output/gpu}
case $part in
  1) LIMIT=${LIMIT:-270} ;;
  2) LIMIT=${LIMIT:-460} ;;
  *) echo "usage: bash benchmarks/gpu.sh 1|2" >&2 && exit 2 ;;
esac
CLIPS=$(cd "${CLIPS:-.clips}" && pwd) || exit 2
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1

# The large model, or a tiny one with at most 2 clips
large() { # LARGE TINY: print one of them
  if [ "$SIZE" = tiny ]; then echo "$2"; else echo "$1"; fi
}
step_flags=(--device "$DEVICE" --repeats 5) run_flags=(--device "$DEVICE" --precision bf16 --print_freq 10)
if [ "$SIZE" = tiny ]; then
  export TORCHDYNAMO_DISABLE=1 # a CPU would compile half a minute for each row
  step_flags+=(--input_size 32 --num_frames 4 --repeats 1)
  run_flags+=(--input_size 32 --num_frames 4 --num_workers 1)
else
  run_flags+=(--num_workers 14)
fi
pretrain_flags=(--model "mae_vit_$(large large_patch16 tiny_patch8)" --batch_size "$(large 16 2)"
  --pred_t_dim "$(large 8 2)" --vis_period 0 "${run_flags[@]}")

try_() { # SECONDS NAME COMMAND...: run it for at most so long; note whether it succeeded
  local limit=$1 name=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status=skipped result=failed
  shift 2
  if ((limit > left)); then limit=$left; fi
  printf '\n=== %s: %d s after the start, at most %d s\n$ %s\n' "$name" "$start" "$limit" "$*"
  if ((limit > 0)); then
    timeout --preserve-status -k 20 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    status=${PIPESTATUS[0]}
  fi
  if [ "$status" = 0 ]; then result=ok; fi
  printf '%-6s %-20s status %-7s %4d s\n' "$result" "$name" "$status" $((SECONDS - start)) |
    tee -a "$work/results"
}

warming_up=""
step() { # SECONDS NAME FLAGS...: measure steps, or compile them in the background
  local command=(python3 -m benchmarks.step "${step_flags[@]}" "${@:3}")
  if [ "$warming_up" ]; then
    timeout 120 "${command[@]}" --repeats 1 &>/dev/null &
  else
    try_ "$1" "$2" "${command[@]}"
  fi
}

# An epoch of 50 steps, from a csv that is repeated
while cat "$CLIPS/train.csv"; do :; done 2>/dev/null | head -n "$(large 800 20)" >"$work/train.csv"
model=$(large large tiny) both=$(large "ours compiled" compiled)
pretraining=(--model "$model" --task pretrain --mask_ratio 0.9 --precision bf16)

first_contact() {
  if [ "$DEVICE" = cuda ]; then
    try_ 15 nvidia-smi nvidia-smi --format=csv \
      --query-gpu=name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm
  fi
  try_ 40 rates python3 - "$DEVICE" <<'EOF'
import sys, time
import av, cv2, timm, torch, torchvision

print("Python", sys.version.split()[0], "CUDA", torch.version.cuda, end=" ")
print("cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
print(*(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, timm, av, cv2)))
gpu = sys.argv[1] == "cuda"
n, size = (8192, 2**32) if gpu else (512, 2**24)
a, b = torch.randn(2, n, n, device=sys.argv[1], dtype=torch.bfloat16)
x, y = torch.zeros(2, size, device=sys.argv[1], dtype=torch.uint8)
runs = ("bf16 product", 2 * n**3, lambda: a @ b), ("copy", 2 * size, lambda: x.copy_(y))
for name, work, run in runs:
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    print(f"{name}: {work / min(times) / 1e12:.3f} T/s (operations; bytes read and written)")
EOF

  if [ "$SIZE" = tiny ]; then
    try_ 60 attention python3 -m benchmarks.attention --device "$DEVICE" --batch_size 1 --repeats 1
  else
    try_ 40 attention python3 -m benchmarks.attention --device "$DEVICE" --check
  fi
  step 100 profile "${pretraining[@]}" --batch_size "$(large 128 2)" --variants $both \
    --profile "$OUT/profile.txt"
  local workers=()
  if [ "$SIZE" != tiny ] && python3 -c 'import xdist' 2>/dev/null; then workers=(-n 5); fi
  try_ 90 tests env OMP_NUM_THREADS=2 python3 -m pytest -q "${workers[@]}" tests/test_gpu.py
  try_ 60 pretrain python3 main_pretrain.py --path_to_data_dir "$work" --path_prefix "$CLIPS" \
    "${pretrain_flags[@]}" --compile --epochs 1 --warmup_epochs 1 --output_dir ""
}

steps() {
  # with fewer than 48 clips, launching takes longer than our step; the plain one needs 90 GiB
  local batch
  batch=$(large "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    awk '{ print ($1 > 130000) ? 48 : 16; exit }')" 2)
  step 60 finetune-test --model "$model" --task finetune test --precision bf16 \
    --batch_size "$(large 32 2)" --variants $both
  step 90 plain "${pretraining[@]}" --batch_size "$batch" --variants plain ours compiled
  TORCHINDUCTOR_CUDAGRAPHS=1 step 60 graphs --model $(large "base large" tiny) --task pretrain \
    --mask_ratio 0.9 --precision bf16 --batch_size "$(large 16 2)" --variants $both
  step 60 unmasked "${pretraining[@]}" --mask_ratio 0 0.9 --batch_size "$(large 64 2)" \
    --variants $both
  step 60 base-huge --model $(large "base huge" tiny) --task pretrain --mask_ratio 0.9 \
    --precision bf16 --batch_size "$(large 64 2)" --variants $both
  step 40 batch-8 "${pretraining[@]}" --batch_size "$(large 8 2)" --variants $both
  TORCHINDUCTOR_MAX_AUTOTUNE=1 TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 step 60 tuned \
    --model "$model" --task finetune --precision bf16 --batch_size "$(large 32 2)" --variants compiled
}

numbers() {
  if [ "$DEVICE" = cuda ]; then # all at once, into the caches on disk; some may run out of memory
    warming_up=1 && steps
    wait && warming_up=""
  fi
  steps
  if [ "$SIZE" = tiny ]; then # it takes minutes on a CPU
    try_ 60 demo python3 -m demo.end_to_end --help
  else # on the GPU and in bf16 by default
    try_ 200 demo python3 -m demo.end_to_end --out "$work/demo" --data "$work/videos"
  fi
}

main() {
  if [ "$part" = 1 ]; then first_contact; else numbers; fi
  printf '\n=== part %s: %d s in all\n' "$part" "$SECONDS"
  cat "$work/results"
  ! grep -q '^failed' "$work/results"
}

main 2>&1 | tee "$OUT/part$part.log"
exit "${PIPESTATUS[0]}"
