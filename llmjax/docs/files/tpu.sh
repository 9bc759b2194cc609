#!/bin/bash
# Llama 3 8B on 64 TPU v5p of Google Cloud: bash llmjax/docs/files/tpu.sh
# Fit NAME, ZONE and BUCKET. Not run on a TPU by us.
set -eu
NAME=llama3-8b
ZONE=us-east5-a
BUCKET=my-bucket

# v5p-128 counts cores: 64 chips of two cores.
gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type v5p-128 --version v2-alpha-tpuv5

everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

# On every host: the code, JAX for TPUs, and a folder that all hosts see for runs/ and data/.
everywhere "git clone YOUR-COPY-OF-THIS-REPOSITORY trainer && mkdir -p trainer/shared"
everywhere "cd trainer && pip install uv && uv sync --extra tpu && gcsfuse --implicit-dirs $BUCKET shared"

# The same command on every host; they find each other. Run it again to continue.
everywhere "cd trainer && uv run --extra tpu llmjax train llama3_8b_v5p_64 --runs shared/runs --save-minutes 20 \
    --data.path shared/corpus --data.tokenizer.path shared/tokenizer.json"
