"""Facts of each chip, with the source beside each value.

A `Chip` is what JAX calls one device. Bytes are decimal (10^9 per GB) everywhere. FLOP/s are dense peaks, `flops` those
of bfloat16.
Sources, by the short names used below:

    book-tpu  jax-ml/scaling-book, tpus.md (network figures at commit 54e2c439)
    book-gpu  jax-ml/scaling-book, gpus.md at commit 1a55377
    google    cloud.google.com/tpu/docs, the page of that TPU version
    nvidia    the datasheet of that GPU or machine, dense
    maxtext   AI-Hypercomputer/maxtext, the peak it divides by
    jax       jax/_src/pallas/mosaic/tpu_info.py (0.10.2): which device_kind is which chip
    fit       `llmjax plan --published tests/plan/published_runs.csv` on so many rows; it prints the error of each

An `Efficiency` is what training reaches of these peaks. Its `link` and `network` are not fitted: 0.8 of the bandwidth
is what large collectives reach (scaling-book, gpus.md: 370 of 450 GB/s in an H100 node; tpu-recipes: 179 of 200 GB/s on
Ironwood).
"""

from llmjax.mesh import Chip, Efficiency

# A CPU's peak depends on the model, the clock and the cores: nothing here could be true of every machine.
CPU = Chip("cpu", "cpu", kinds=("cpu",))

A100 = Chip(
    "A100",
    "gpu",
    kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),  # the 40 GB and PCIe cards are other chips
    flops=312e12,  # book-gpu (3.1e14, unrounded)
    int8=624e12,  # nvidia: datasheet
    memory=80e9,  # book-gpu
    bandwidth=2.0e12,  # book-gpu
    link=300e9,  # book-gpu: NVLink egress, nodes of 8
    network=200e9 / 8,  # nvidia: a DGX A100 has eight HDR links of 25 GB/s for a node's eight chips
    domain=8,
    efficiency=Efficiency(matmul=0.82, attention=0.23, memory=0.7, overlap=0.51, doubling=0.0),  # fit: 13 rows
)
H100 = Chip(
    "H100",
    "gpu",
    kinds=("NVIDIA H100 80GB HBM3",),  # SXM; PCIe and NVL cards have lower peaks
    flops=989e12,  # book-gpu (9.9e14, unrounded)
    int8=1979e12,  # nvidia: datasheet
    fp8=1979e12,  # book-gpu (2.0e15, unrounded)
    memory=80e9,  # book-gpu
    bandwidth=3.4e12,  # book-gpu
    link=450e9,  # book-gpu: NVLink egress, nodes of 8
    network=400e9 / 8,  # book-gpu: 400 GB/s per node of 8
    domain=8,
    efficiency=Efficiency(matmul=0.71, attention=0.22, memory=0.88, overlap=0.84, doubling=0.015),  # fit: 38 rows
)
H200 = Chip(
    "H200",
    "gpu",
    kinds=("NVIDIA H200",),
    flops=989e12,  # book-gpu: as H100
    int8=1979e12,  # as H100
    fp8=1979e12,  # as H100
    memory=141e9,  # book-gpu
    bandwidth=4.8e12,  # book-gpu
    link=450e9,  # book-gpu: as H100
    network=400e9 / 8,  # book-gpu: as H100
    domain=8,
    efficiency=H100.efficiency,  # fit: with the H100's rows
)
B200 = Chip(
    "B200",
    "gpu",
    kinds=("NVIDIA B200",),
    flops=2.3e15,  # book-gpu
    fp8=4.5e15,  # book-gpu
    memory=192e9,  # book-gpu
    bandwidth=8.0e12,  # book-gpu
    link=900e9,  # book-gpu: NVLink egress, nodes of 8
    network=400e9 / 8,  # book-gpu: 400 GB/s per node of 8
    domain=8,
    efficiency=Efficiency(matmul=0.68, attention=0.35, memory=0.61, overlap=0.61, doubling=0.021),  # fit: 4 rows
)
TPU_V4 = Chip(
    "TPU v4",
    "tpu",
    kinds=("TPU v4",),  # jax
    flops=2.75e14,  # book-tpu
    int8=2.75e14,  # book-tpu: no faster
    memory=32e9,  # book-tpu
    bandwidth=1.2e12,  # book-tpu
    link=4.5e10,  # book-tpu: each of 3 axes
    torus=3,
    network=6.25e9,  # book-tpu
    efficiency=Efficiency(matmul=0.85, attention=0.48, memory=0.95, overlap=0.27, doubling=0.014),  # fit: 7 rows
)
TPU_V5E = Chip(
    "TPU v5e",
    "tpu",
    kinds=("TPU v5e", "TPU v5 lite"),  # jax
    flops=1.97e14,  # book-tpu
    int8=3.94e14,  # book-tpu
    memory=16e9,  # book-tpu
    bandwidth=8.1e11,  # book-tpu
    link=4.5e10,  # book-tpu: each of 2 axes
    torus=2,
    network=3.125e9,  # book-tpu
    efficiency=Efficiency(matmul=0.9, attention=0.54, memory=0.95, overlap=0.6, doubling=0.016),  # fit: 25 rows
)
TPU_V5P = Chip(
    "TPU v5p",
    "tpu",
    kinds=("TPU v5p", "TPU v5"),  # jax
    flops=4.59e14,  # book-tpu
    int8=9.18e14,  # book-tpu
    memory=96e9,  # book-tpu
    bandwidth=2.8e12,  # book-tpu
    link=9e10,  # book-tpu: each of 3 axes
    torus=3,
    network=6.25e9,  # book-tpu
    efficiency=Efficiency(matmul=0.86, attention=0.62, memory=0.8, overlap=0.51, doubling=0.009),  # fit: 10 rows
)
TPU_V6E = Chip(
    "TPU v6e",
    "tpu",
    kinds=("TPU v6e", "TPU v6 lite"),  # jax
    flops=9.18e14,  # maxtext; book-tpu rounds it to 9.2e14
    int8=1.836e15,  # book-tpu (1.84e15, unrounded)
    memory=32e9,  # book-tpu
    bandwidth=1.6e12,  # book-tpu
    link=9e10,  # book-tpu: each of 2 axes
    torus=2,
    network=12.5e9,  # book-tpu
    efficiency=Efficiency(matmul=0.75, attention=0.52, memory=0.95, overlap=0.18, doubling=0.06),  # fit: 16 rows
)
# JAX shows an Ironwood chip as two devices. These are the facts of one device: the chip's, halved.
TPU_7X = Chip(
    "TPU 7x",
    "tpu",
    kinds=("TPU7x",),  # jax
    flops=2.307e15 / 2,  # google
    fp8=4.614e15 / 2,  # google; of v5p and v6e it says that fp8 is no faster than bfloat16
    memory=192e9 / 2,  # google
    bandwidth=7.4e12 / 2,  # derived from google's figures
    link=9e10 / 2,  # derived: the lower of 9e10 and 1e11 for each of 3 axes
    devices=2,
    torus=3,
    efficiency=Efficiency(matmul=0.89, attention=0.24, memory=0.67, overlap=0.35, doubling=0.015),  # fit: 2 rows
)

KNOWN = (CPU, A100, H100, H200, B200, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, TPU_7X)
