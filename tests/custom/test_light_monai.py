from __future__ import annotations

import subprocess
import sys

from custom.diffusion.light_monai import NOT_NEEDED


def test_a_training_process_starts_without_the_optional_packages_and_can_import_them_later() -> None:
    program = (
        "import sys, custom.executors.diffusion_trainer\n"
        f"print([name for name in {NOT_NEEDED!r} if name in sys.modules])\n"
        "import torchvision, skimage, matplotlib\n"
        "print(torchvision.ops.nms is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True"]
