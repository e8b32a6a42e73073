# SPDX-License-Identifier: Apache-2.0
"""Devices as data: what a bound of tokens per second is made of. Vendors' data sheets, dense (no sparsity) figures."""

from __future__ import annotations

from dataclasses import dataclass

from moellava.registry import Registry

SPEEDS = ("tflops", "bandwidth", "link", "network")
"""Fields of a device that flags can give."""


@dataclass(frozen=True)
class Device:
    """One accelerator of a host.

    Args:
        memory: GB (10^9 bytes).
        tflops: of matrix products in 16 bits, 10^12 operations a second; a multiplication and an addition are two.
        tflops_fp32: the same in fp32.
        bandwidth: of its memory, GB/s.
        link: to the other accelerators of its host, GB/s in one direction.
        network: to other hosts, GB/s in one direction, for each accelerator.
        is_gpu: whether experts run as grouped products and weights are in 16 bits unless a flag says otherwise.
    """

    memory: float
    tflops: float
    tflops_fp32: float
    bandwidth: float
    link: float
    network: float = 50.0
    is_gpu: bool = True


DEVICES: Registry[Device] = Registry("device")

for _name, _device in {
    "b200": Device(180, 2250, 75, 8000, 900),
    "h200": Device(141, 989, 67, 4800, 450),
    "h100": Device(80, 989, 67, 3350, 450),
    "a100": Device(80, 312, 19.5, 2039, 300, network=25),
    "a100-40gb": Device(40, 312, 19.5, 1555, 300, network=25),
    "l40s": Device(48, 362, 91.6, 864, 32, network=12.5),
    "a10": Device(24, 125, 31.2, 600, 32, network=6.25),
    "4090": Device(24, 165, 82.6, 1008, 32, network=3.1),
    "3090": Device(24, 71, 35.6, 936, 32, network=3.1),
    "cpu": Device(16, 0.1, 0.1, 10, 5, network=1.2, is_gpu=False),
}.items():
    DEVICES.register(_name, _device)
