"""What a graph finds in pictures, as files to train on."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..imaging.detections import labels_of, masks_of
from ..imaging.pictures import check_pictures
from ..imaging.subject_files import save_subjects


def _output_folder(name: str) -> Path:
    """A folder of that name in ComfyUI's output. Raises ValueError, in one sentence, for one that would lie elsewhere."""
    output = Path(folder_paths.get_output_directory()).resolve()
    path = (output / name.strip()).resolve()
    if not name.strip() or output not in path.parents:
        raise ValueError(
            f"'folder' is {name!r}, and must be the name of a folder in ComfyUI's output, such as subjects."
        )
    return path


class TrueFillSaveSubjects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillSaveSubjects",
            display_name="Save Subjects (TrueFill)",
            category="TrueFill/6 finish",
            description="Writes pictures, the masks of the subjects in them and their prompts into a folder of ComfyUI's output: "
            "LAR-Gen's training data, as its construction leaves them. Detect and Segment find the subjects.",
            search_aliases=["data set", "training data", "save mask", "quadruples", "lar-gen", "dataset"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The pictures."),
                io.Mask.Input(
                    "mask",
                    tooltip="The subjects, from Segment with 'separate' on: for each picture one mask for each of its labels, or "
                    "one mask where it has none.",
                ),
                io.String.Input(
                    "labels",
                    force_input=True,
                    tooltip='What the subjects are, from Detect: [["red cup", "spoon"], ["dog"]]. It is written as the prompt; '
                    "what a captioner says of the crop is better.",
                ),
                io.String.Input(
                    "folder", default="subjects", tooltip="The folder's name, in ComfyUI's output. What is in it stays."
                ),
                io.Float.Input(
                    "smallest",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="A subject below this share of the picture, in percent, is left out.",
                ),
                io.Float.Input(
                    "largest",
                    default=60.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="A subject above this share of the picture, in percent, is left out.",
                ),
            ],
            outputs=[io.String.Output(display_name="files", tooltip="The masks' files that were written, as text.")],
        )

    @classmethod
    def execute(
        cls, image: io.Image.Type, mask: io.Mask.Type, labels: str, folder: str, smallest: float, largest: float
    ) -> io.NodeOutput:
        check_pictures(image, "'image'")
        if smallest > largest:
            raise ValueError(f"'smallest' ({smallest:g} %) is greater than 'largest' ({largest:g} %): no subject fits.")
        each = labels_of(labels, len(image))
        masks = masks_of(mask, each, image.shape[1:3])
        path = _output_folder(folder)
        written = save_subjects(path, image, masks, each, smallest / 100.0, largest / 100.0)
        names = [of.mask.name for of in written]
        said = f"{len(names)} of {sum(map(len, each))} subjects saved in {path}"
        return io.NodeOutput("\n".join(names), ui=ui.PreviewText(said))


NODES = [TrueFillSaveSubjects]
