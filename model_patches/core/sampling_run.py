"""One run of a sampler, and the methods that are its guests.

A node only leaves settings on a clone of the model, and one keyed wrapper around the sampler. All the rest is put into the
options of a single run, when it is known what else is on the model, and is gone with that run, also after an error or an
interrupt. Any number of methods, in any order of their nodes, next to other packs' patches.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy.samplers import KSAMPLER

from ...imaging.masks import as_mask_batch
from .autograd import make_weights_ordinary, staying
from .call_rows import ROWS_KEY, Conds, PromptRows, has_weight, with_all_rows, with_rows
from .holes import hole_on_latent
from .joint_attention import JointCall, install
from .protocol import Method, MethodRun, UNetCall
from .refusals import refuse_compiled, refuse_copy
from .token_layout import token_layout
from .unet_attention import TransformerPlace, transformer_places

KEY = "TrueFill"
"""Key of our wrappers, and of the methods' settings (by name) in `model_options`."""

_RUN = "TrueFill run"
"""Where the options of a run have its `SamplingRun`."""


def with_method(model: ModelPatcher, settings: Method) -> ModelPatcher:
    """Returns a clone of `model` that samples with a method; it replaces one of the same key. Strength 0 takes that one off.

    Raises ValueError for a model that the method can't act on, and for a mask that is none.
    """
    settings.check(model)
    if settings.mask is not None:
        settings = replace(settings, mask=as_mask_batch(settings.mask))
    acts = settings.strength != 0
    model = staying(model) if acts and settings.records_graph else model.clone()
    options: dict[str, Any] = model.model_options
    others = {key: other for key, other in _methods(options).items() if key != settings.key}
    options[KEY] = {**others, settings.key: settings} if acts else others
    model.remove_additional_models(_models_key(settings))
    if acts and (networks := settings.models()):
        model.set_additional_models(_models_key(settings), list(networks))
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _prepare), (WrappersMP.SAMPLER_SAMPLE, _sample)):
        model.remove_wrappers_with_key(kind, KEY)
        if options[KEY]:
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def method_keys(model: ModelPatcher) -> Sequence[str]:
    """The keys of the methods that are on a model."""
    return tuple(_methods(model.model_options))


def of_part(model: ModelPatcher, cut: Callable[[torch.Tensor], torch.Tensor]) -> ModelPatcher:
    """`model` with its methods for a sampler that works on a part of the picture (`Method.of_part`)."""
    methods = _methods(model.model_options)
    model = model.clone()
    options: dict[str, Any] = model.model_options
    if methods:
        options[KEY] = {key: method.of_part(cut) for key, method in methods.items()}
    return model


def _methods(model_options: Mapping[str, Any]) -> dict[str, Method]:
    """What the nodes have asked for, by key. Never changed, only replaced: clones of a model share it."""
    return model_options.get(KEY, {})


def _models_key(settings: Method) -> str:
    return f"{KEY} {settings.key}"


def _prepare(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Wrapper around the host's `CFGGuider.outer_sample`, whose `model_options` are the run's own."""
    guider, size = executor.class_obj, (noise.shape[-2], noise.shape[-1])
    methods = {key: method.prepared(size) for key, method in _methods(guider.model_options).items()}
    if guider.model_patcher.get_additional_models_with_key("multigpu"):
        for method in methods.values():
            if method.models():
                refuse_copy(method.name)
    guider.model_options = {**guider.model_options, KEY: methods}
    return executor(noise, *args, **kwargs)


def _sample(
    executor: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Wrapper around the host's `Sampler.sample`: one run with the methods that the model's options ask for."""
    seed = extra_args.get("seed") or 0
    run = SamplingRun(guider, extra_args["model_options"], noise, latent_image, denoise_mask, seed)
    for settings in _methods(extra_args["model_options"]).values():
        run.begin(settings)
    if not run.acts:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    sampler = run.sampler(executor.class_obj)
    with run.installed():
        extra_args = {**extra_args, "model_options": run.options}
        noise = run.first_noise(sigmas, extra_args, noise, latent_image, denoise_mask)
        # The next wrapper, or the sampler itself, with a sampler that is a changed copy of the one given.
        following = type(executor).new_class_executor(sampler.sample, sampler, executor.wrappers, executor.idx + 1)
        rest = (callback, noise, latent_image, denoise_mask, *args)
        return following.execute(guider, sigmas, extra_args, *rest, **kwargs)


@contextmanager
def running(
    guider: Any,
    model_options: dict[str, Any],
    noise: torch.Tensor,
    latent_image: torch.Tensor | None,
    denoise_mask: torch.Tensor | None,
) -> Iterator[SamplingRun]:
    """For samplers that are methods themselves: the run in which the methods on the MODEL take part, or else a new one.

    Within it, sample with the run's `options`.
    """
    run: SamplingRun | None = model_options.get(_RUN)
    if run is not None:
        yield run
        return
    run = SamplingRun(guider, model_options, noise, latent_image, denoise_mask)
    with run.installed():
        yield run


class SamplingRun:
    """The state of one run, and the wrappers through which the host's calls reach its methods."""

    def __init__(
        self,
        guider: Any,
        model_options: dict[str, Any],
        noise: torch.Tensor,
        latent_image: torch.Tensor | None,
        denoise_mask: torch.Tensor | None,
        seed: int = 0,
    ):
        """`guider` is the host's, with its model loaded; what is sampled has the shape of `noise`, [B, C, h, w]."""
        self._guider = guider
        self._noise, self._latent_image, self._denoise_mask = noise, latent_image, denoise_mask
        self._latent_size = (noise.shape[-2], noise.shape[-1])
        self._guests: dict[str, _Guest] = {}
        self._holes: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._places: dict[int, list[TransformerPlace]] = {}
        self._ordinary_weights: set[int] = set()
        self._held_edits: ExitStack | None = None
        self.seed = seed
        """The sampler's."""
        self.sigma = 0.0
        """The noise level of the evaluation that is going on."""
        self.options = model_options
        """The model's options; within `installed` those of this run."""

    @property
    def model(self) -> Any:
        """The host's loaded model."""
        return self._guider.inner_model

    @property
    def batch(self) -> int:
        """How many pictures are sampled."""
        return len(self._noise)

    @property
    def on_several_devices(self) -> bool:
        """Whether the host evaluates positive and negative prompts side by side, on several GPUs."""
        return "multigpu_clones" in self.options

    @property
    def acts(self) -> bool:
        """Whether any method takes part."""
        return bool(self._guests)

    @property
    def needs_every_evaluation(self) -> bool:
        """Whether a method hears of each evaluation, so that the sampler can't go without one whose answer is known."""
        methods = (type(guest.method) for guest in self._guests.values())
        return any(method.begin_evaluation is not MethodRun.begin_evaluation for method in methods)

    def models(self, settings: Method) -> list[ModelPatcher]:
        """The method's further networks (`Method.models`), as the host has loaded them."""
        return self._guider.model_patcher.get_additional_models_with_key(_models_key(settings))

    def hole(self, mask: torch.Tensor | None, who: str) -> torch.Tensor:
        """How much of each cell of the latent is hole, [B, 1, h, w], by `mask`, else by what latent or conditioning say.

        Raises ValueError, which names `who`, where none of them has a mask.
        """
        if id(mask) not in self._holes:
            self._holes[id(mask)] = mask, hole_on_latent(mask, self._guider, self._noise, self._denoise_mask, who)
        return self._holes[id(mask)][1]

    def require_finite(self, who: str) -> None:
        """Raises ValueError, in one sentence that begins with `who`, where the latents it starts from are not finite."""
        entries = [entry for of_role in self._guider.conds.values() for entry in of_role]
        given = [self._latent_image, *(entry.get("concat_latent_image") for entry in entries)]
        if not all(bool(latent.isfinite().all()) for latent in given if latent is not None):
            raise ValueError(
                f"{who} was given a latent with NaN or infinite values: look at the picture that it was encoded from, and if "
                "that is right, start ComfyUI with --fp32-vae."
            )

    def begin(self, settings: Method) -> None:
        """Lets a method take part, unless one of its key does already, or there is no hole.

        Raises ValueError, in one sentence, for a compiled model and where nobody says where the hole is.
        """
        refuse_compiled(self.options, settings.name)
        if settings.key in self._guests:
            return
        hole = self.hole(settings.mask, settings.name)
        guest = settings.begin(self, hole) if bool(hole.any()) else None
        if guest is not None:
            self._join(_Guest(settings.key, settings.order, guest, self._window(settings)))

    @contextmanager
    def with_guest(self, name: str, order: int, guest: MethodRun) -> Iterator[None]:
        """A guest for the length of the context, at every noise level."""
        self._join(_Guest(name, order, guest, lambda sigma: True))
        try:
            yield
        finally:
            del self._guests[name]

    @contextmanager
    def graph_recorded(self) -> Iterator[None]:
        """For a graph through the calls within it, and its backward pass: the model's weights are such that autograd may save
        them, and the edits of the calls stay until its end, since blocks may run again."""
        try:
            with ExitStack() as self._held_edits:
                yield
        finally:
            self._held_edits = None

    def make_weights_ordinary(self, unet: torch.nn.Module) -> None:
        """Lets autograd save the weights of the model that is called."""
        if id(unet) not in self._ordinary_weights:
            with torch.inference_mode(False):
                make_weights_ordinary(unet)
            self._ordinary_weights.add(id(unet))

    def sampler(self, sampler: Any) -> Any:
        """The sampler to run, as the methods want it. The given one is not changed."""
        for guest in self._in_order():
            sampler = guest.method.sampler(sampler)
        function = getattr(sampler, "sampler_function", None)
        if function is None or not self.needs_every_evaluation:
            return sampler

        @functools.wraps(function)
        def evaluated(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return function(_Evaluations(model, self), *args, **kwargs)

        changed = copy.copy(sampler)
        changed.sampler_function = evaluated
        return changed

    def first_noise(
        self,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        noise: torch.Tensor,
        latent_image: torch.Tensor | None,
        denoise_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The noise to begin with, as the methods want it; the arguments are those of the host's `Sampler.sample`."""

        def look(noise: torch.Tensor) -> None:
            sampler = KSAMPLER(_evaluate_once)
            sampler.sample(self._guider, sigmas, extra_args.copy(), None, noise, latent_image, denoise_mask)

        for guest in self._in_order():
            if guest.acts_at(float(sigmas[0])):
                noise = guest.method.noise(noise, look)
        return noise

    def begin_evaluation(self) -> None:
        """The sampler is about to evaluate the model."""
        for guest in self._in_order():
            guest.method.begin_evaluation()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the run's options reach its methods, and the guider's conditionings say which rows of a call are theirs.

        Those without any weight are left out: no method shall go by a prompt that the picture doesn't follow.
        """
        options, original = self.options, self._guider.conds
        self.options = self._with_wrappers(create_model_options_clone(options))
        self._guider.conds = {
            role: [with_rows(role, entry, self._latent_size) for entry in entries if has_weight(entry)]
            for role, entries in original.items()
        }
        try:
            yield
        finally:
            self._guider.conds = original
            # Nothing of the run may keep the model alive: options, wrappers and run refer to each other.
            self.options = options
            self._guests.clear()
            self._places.clear()

    def _with_wrappers(self, options: dict[str, Any]) -> dict[str, Any]:
        for kind, wrapper in (
            (WrappersMP.CALC_COND_BATCH, self._calc_cond_batch),
            (WrappersMP.APPLY_MODEL, self._apply_model),
            (WrappersMP.DIFFUSION_MODEL, self._diffusion_model),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, options, is_model_options=True)
        options[_RUN] = self
        return options

    def _join(self, guest: _Guest) -> None:
        self._guests[guest.name] = guest

    def _in_order(self) -> list[_Guest]:
        return sorted(self._guests.values(), key=lambda guest: guest.order)

    def _acting(self) -> list[MethodRun]:
        """The methods that act at the present noise level, in order."""
        return [guest.method for guest in self._in_order() if guest.acts_at(self.sigma)]

    def _window(self, settings: Method) -> Callable[[float], bool]:
        """Whether a noise level lies between start and end, in percent of sampling."""
        sampling = self.model.model_sampling
        first, last = (sampling.percent_to_sigma(p) for p in (settings.start_percent, settings.end_percent))
        return lambda sigma: last < sigma <= first

    def _calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: Conds,
        x: torch.Tensor,
        timestep: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Wrapper around the host's evaluation of all conditionings at one noise level."""
        self.sigma = float(timestep[0])

        def evaluate(conds: Conds) -> list[torch.Tensor]:
            return executor(model, conds, x, timestep, *args, **kwargs)

        for method in self._acting():
            evaluate = functools.partial(method.evaluate, evaluate)
        return evaluate(with_all_rows(conds, self._latent_size))

    def _apply_model(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Wrapper around one call of a model, for those without a UNet: each class of them takes its inputs in another order."""
        options = {} if transformer_options is None else transformer_options.copy()
        network = executor.class_obj.diffusion_model
        acting = self._acting()
        if not isinstance(network, UNetModel):
            rows: tuple[PromptRows, ...] | None = kwargs.pop(ROWS_KEY, None)
            if rows is not None and acting:
                self._check_rows(x, rows)
                who = ", ".join(self._guests)
                layout = token_layout(network, x.shape[2:], c_crossattn, kwargs, who)
                call = JointCall(layout=layout, rows=rows)
                edits = [edit for method in acting if (edit := method.edit_joint(call)) is not None]
                install(options, layout, edits, who)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Wrapper around one call of the network."""
        if isinstance(executor.class_obj, UNetModel):
            return self._unet(executor, *args, **kwargs)
        return executor(*args, **kwargs)

    def _unet(
        self,
        executor: Any,
        x: torch.Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Wrapper around one call of the UNet."""
        rows: tuple[PromptRows, ...] | None = kwargs.pop(ROWS_KEY, None)
        options = {} if transformer_options is None else transformer_options.copy()
        acting = self._acting()
        if rows is None or not acting:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        self._check_rows(x, rows)
        unet = executor.class_obj
        if id(unet) not in self._places:
            self._places[id(unet)] = transformer_places(unet)
        call = UNetCall(
            unet=unet,
            places=self._places[id(unet)],
            rows=rows,
            sigma=self.sigma,
            x=x,
            timesteps=timesteps,
            context=context,
            y=y,
            control=control,
            options=options,
            keywords=kwargs,
            others_write=control is not None or any(options.get(kind) for kind in ("patches", "patches_replace")),
        )

        def call_unet(call: UNetCall) -> torch.Tensor:
            arguments = (call.x, call.timesteps, call.context, call.y, call.control, call.options)
            return executor(*arguments, **call.keywords)

        for method in acting:
            call_unet = functools.partial(method.call_unet, call_unet)
        with ExitStack() as edits:
            for method in acting:
                edits.enter_context(method.edit(call))
            if self._held_edits is not None:
                self._held_edits.push(edits.pop_all())
                self.make_weights_ordinary(unet)
            return call_unet(call)

    def _latent_size_of(self, rows: Sequence[PromptRows]) -> tuple[int, int]:
        """Height and width of the latents that a call with these rows sees, all of the same size."""
        return self._latent_size if rows[0].area is None else rows[0].area[:2]

    def _check_rows(self, x: torch.Tensor, rows: Sequence[PromptRows]) -> None:
        height, width = self._latent_size_of(rows)
        if tuple(x.shape[-2:]) != (height, width) or x.shape[0] != self.batch * len(rows):
            raise ValueError(
                f"{', '.join(self._guests)} expected latents of {width}x{height} cells and the model was called with "
                f"{x.shape[-1]}x{x.shape[-2]}: another node cuts the latent into tiles; take it or the TrueFill nodes out."
            )


class _Guest:
    """A method that takes part in a run, and at which noise levels."""

    def __init__(self, name: str, order: int, method: MethodRun, acts_at: Callable[[float], bool]):
        self.name, self.order, self.method, self.acts_at = name, order, method, acts_at


def _evaluate_once(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **keywords: Any
) -> torch.Tensor:
    """A function for the host's KSAMPLER that changes nothing."""
    model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)
    return x


class _Evaluations:
    """The model as a sampler calls it, telling the run when an evaluation begins."""

    def __init__(self, model: Any, run: SamplingRun):
        self._model = model
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._run.begin_evaluation()
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
