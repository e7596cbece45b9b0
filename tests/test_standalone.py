"""The files made to be copied out work alone, without Pillow (but for augment), PyAV or tqdm."""
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

USES = {
    "hog": "assert hog.HOG()(torch.randn(2, 3, 32, 48)).shape == (2, 3, 9, 4, 6)",
    "masking": "import random; "
               "assert 0 < masking.cube_mask((8, 14, 14), 0.4, random.Random(0)).mean() < 1",
    "vit": "assert vit.vit_tiny(num_classes=5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)",
    "mvit": "assert mvit.mvit_tiny(num_classes=5, num_frames=4, image_size=64)"
            "(torch.randn(1, 3, 4, 64, 64)).shape == (1, 5)",
    "maskfeat": "assert maskfeat.resize_mask(torch.ones(1, 2, 2) > 0, (4, 4)).all()",
    "augment": "import random; image = augment.Image.new('RGB', (8, 8)); "
               "assert len(augment.rand_augment([image, image], random.Random(0))) == 2",
}


@pytest.mark.slow
def test_each_file_works_alone(tmp_path):
    """Each has a folder of its own. Pillow is blocked until the last one, augment."""
    code = "import sys, torch\nfor other in ('PIL', 'av', 'tqdm'): sys.modules[other] = None\n"
    for name, use in USES.items():
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        code += "del sys.modules['PIL']\n" if name == "augment" else ""
        code += f"sys.path[0] = {str(tmp_path / name)!r}\nimport {name}\n{use}\n"
        code += f"del sys.modules[{name!r}]\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
