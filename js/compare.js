// The view on the node Compare (TrueFill): before and after with a divider, the mask's outline, the heat map.
import { app } from '../../scripts/app.js'
import { addStyle, addView, address, button, forwardToCanvas, maker, nodeAt, point } from './dom.js'
import { readTexts, text } from './texts.js'

const NODE = 'TrueFillCompare'
const START_SIZE = [420, 500]
const MIN_HEIGHT = 280
const OUTLINE = { side: 768, line: 3, color: [0, 229, 255], edge: [0, 0, 0] }
const AROUND = [[-1, -1], [0, -1], [1, -1], [-1, 0], [1, 0], [-1, 1], [0, 1], [1, 1]]
const STEPS = {
  ArrowLeft: -1,
  ArrowDown: -1,
  ArrowRight: 1,
  ArrowUp: 1,
  PageDown: -10,
  PageUp: 10,
  Home: -100,
  End: 100
}

const STYLE = `
.truefill-compare { --split: 50%; display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; width: 100%;
  min-width: 0; min-height: ${MIN_HEIGHT}px; overflow: hidden; color: var(--input-text, #ddd);
  font: 12px/1.4 sans-serif; }
.truefill-compare [hidden] { display: none; }
.truefill-compare-bar { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; }
.truefill-compare-views { display: flex; }
.truefill-compare-batch { display: flex; align-items: center; gap: 4px; margin-left: auto; white-space: nowrap; }
.truefill-compare button { min-width: 26px; height: 26px; margin: 0; padding: 0 9px; cursor: pointer;
  white-space: nowrap; border: 1px solid var(--border-color, #4e4e4e); border-radius: 5px;
  background: var(--comfy-input-bg, #222); color: inherit; font: inherit; }
.truefill-compare-views button:first-child { border-radius: 5px 0 0 5px; }
.truefill-compare-views button:last-child { margin-left: -1px; border-radius: 0 5px 5px 0; }
.truefill-compare button:hover:enabled { filter: brightness(1.2); }
.truefill-compare button[aria-pressed="true"] { border-color: #2a7fd0; background: #1f6fbf; color: #fff; }
.truefill-compare button:disabled { opacity: 0.45; cursor: default; }
.truefill-compare :focus-visible { outline: 2px solid #4da3ff; outline-offset: 1px; }
.truefill-compare-frame { flex: 1 1 0; display: grid; place-items: center; min-height: 0; overflow: hidden;
  container-type: size; border-radius: 5px; background: var(--comfy-input-bg, #222); }
.truefill-compare-hint { margin: 0; padding: 12px; text-align: center; opacity: 0.8; }
.truefill-compare-stage { position: relative; width: min(100cqw, 100cqh * var(--ratio)); aspect-ratio: var(--ratio);
  overflow: hidden; cursor: ew-resize; touch-action: none; user-select: none; }
.truefill-compare-stage[data-view="heat"] { cursor: default; }
.truefill-compare-before, .truefill-compare-after, .truefill-compare-stage img, .truefill-compare-stage canvas {
  position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; margin: 0; pointer-events: none; }
.truefill-compare-stage img { background: repeating-conic-gradient(#777 0 25%, #999 0 50%) 0 / 16px 16px; }
.truefill-compare-before { clip-path: inset(0 calc(100% - var(--split)) 0 0); }
.truefill-compare-after { clip-path: inset(0 0 0 var(--split)); }
.truefill-compare-before span, .truefill-compare-after span { position: absolute; top: 6px; padding: 0 6px;
  border-radius: 3px; background: rgb(0 0 0 / 55%); color: #fff; }
.truefill-compare-before span { left: 6px; }
.truefill-compare-after span { right: 6px; }
.truefill-compare-divider { position: absolute; top: 0; bottom: 0; left: var(--split); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; }
.truefill-compare-divider::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; width: 24px;
  height: 24px; transform: translate(-50%, -50%); border-radius: 50%; background: #fff; color: #222;
  box-shadow: 0 0 3px #000; font: 16px/24px sans-serif; text-align: center; }
.truefill-compare-figures { min-height: 2.8em; white-space: pre-line; text-wrap: pretty; overflow-wrap: anywhere;
  user-select: text; }
.truefill-compare-figures:empty { display: none; }
`

const make = maker('truefill-compare')

function picture(name) {
  return make('img', '', { alt: name, draggable: false })
}

/** Draws a line along the inside of all that is not black in a mask, with a dark line inside of that. */
function drawOutline(canvas, mask) {
  const scale = OUTLINE.side / Math.max(mask.naturalWidth, mask.naturalHeight)
  const width = (canvas.width = Math.max(1, Math.round(mask.naturalWidth * scale)))
  const height = (canvas.height = Math.max(1, Math.round(mask.naturalHeight * scale)))
  const context = canvas.getContext('2d', { willReadFrequently: true })
  context.imageSmoothingEnabled = scale < 1
  context.imageSmoothingQuality = 'high'
  context.drawImage(mask, 0, 0, width, height)
  const source = context.getImageData(0, 0, width, height).data
  const drawn = context.createImageData(width, height)
  const isHole = (x, y) => x >= 0 && y >= 0 && x < width && y < height && source[4 * (y * width + x)] > 0
  const isNearEdge = (x, y, by) => AROUND.some(([dx, dy]) => !isHole(x + by * dx, y + by * dy))
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!isHole(x, y) || !isNearEdge(x, y, 2 * OUTLINE.line)) continue
      const color = isNearEdge(x, y, OUTLINE.line) ? OUTLINE.color : OUTLINE.edge
      drawn.data.set([...color, 255], 4 * (y * width + x))
    }
  }
  context.putImageData(drawn, 0, 0)
}

/** What the widget shows; `element` is its root. */
class CompareView {
  frames = []
  index = 0
  split = 50
  heatShown = false
  maskShown = false

  constructor() {
    this.buildBar()
    this.buildStage()
    this.hint = make('p', 'hint')
    this.figures = make('div', 'figures', { role: 'status' })
    this.element = make('div', '', {}, this.bar, make('div', 'frame', {}, this.hint, this.stage), this.figures)
    this.element.className = 'truefill-compare'
    forwardToCanvas(this.element)
    this.render()
  }

  buildBar() {
    this.sliderButton = button(text('slider'), text('slider_title'), () => this.setView(false))
    this.heatButton = button(text('difference'), text('difference_title'), () => this.setView(true))
    this.maskButton = button(text('mask'), text('mask_outline'), () => this.toggleMask())
    this.previous = button('\u2039', text('previous_picture'), () => this.step(-1), text('previous_picture'))
    this.next = button('\u203a', text('next_picture'), () => this.step(1), text('next_picture'))
    this.place = make('span', 'place')
    this.batch = make('div', 'batch', {}, this.previous, this.place, this.next)
    const views = make('div', 'views', { role: 'group', 'aria-label': text('view') }, this.sliderButton, this.heatButton)
    this.bar = make('div', 'bar', {}, views, this.maskButton, this.batch)
    // To the editor these are shortcuts.
    this.bar.addEventListener('keydown', (event) => {
      if (event.key === ' ' || event.key === 'Enter') event.stopPropagation()
    })
  }

  buildStage() {
    this.before = picture(text('before'))
    this.after = picture(text('after'))
    this.heat = picture(text('difference'))
    this.outline = make('canvas')
    this.divider = make('div', 'divider', {
      role: 'slider',
      tabIndex: 0,
      'aria-label': text('divider'),
      'aria-valuemin': 0,
      'aria-valuemax': 100
    })
    const after = make('div', 'after', {}, this.after, make('span', '', { textContent: text('after') }))
    const before = make('div', 'before', {}, this.before, make('span', '', { textContent: text('before') }))
    this.sides = [after, before, this.divider]
    this.stage = make('div', 'stage', {}, after, before, this.heat, this.outline, this.divider)
    this.before.addEventListener('load', () => this.fit())
    for (const image of [this.before, this.after, this.heat]) image.addEventListener('error', () => this.giveUp())
    this.stage.addEventListener('pointerdown', (event) => this.startDrag(event))
    this.stage.addEventListener('pointermove', (event) => this.drag(event))
    this.divider.addEventListener('keydown', (event) => this.onKey(event))
  }

  /** Shows what a run has left: the node's `ui` result; none leaves the view as it is. */
  show(output) {
    if (!output?.before?.length) return
    this.frames = output.before.map((before, index) => ({
      before: address(before),
      after: address(output.after?.[index]),
      heat: address(output.heat?.[index]),
      mask: address(output.mask?.[index]),
      text: output.text?.[index] ?? ''
    }))
    this.index = Math.min(this.index, this.frames.length - 1)
    this.render()
  }

  setView(heatShown) {
    this.heatShown = heatShown
    this.render()
  }

  toggleMask() {
    this.maskShown = !this.maskShown
    this.render()
  }

  step(by) {
    this.index = Math.min(Math.max(this.index + by, 0), this.frames.length - 1)
    this.render()
  }

  setSplit(split) {
    this.split = Math.min(Math.max(split, 0), 100)
    this.element.style.setProperty('--split', `${this.split}%`)
    this.divider.setAttribute('aria-valuenow', Math.round(this.split))
  }

  render() {
    const frame = this.frames[this.index]
    this.hint.textContent = text('compare_run_first')
    this.hint.hidden = !!frame
    this.stage.hidden = !frame
    this.stage.dataset.view = this.heatShown ? 'heat' : 'slider'
    for (const part of this.sides) part.hidden = this.heatShown
    point(this.before, frame?.before)
    point(this.after, frame?.after)
    point(this.heat, this.heatShown ? frame?.heat : '')
    this.renderBar(frame)
    this.renderOutline(frame)
    this.figures.textContent = frame?.text ?? ''
    this.setSplit(this.split)
  }

  renderBar(frame) {
    this.sliderButton.setAttribute('aria-pressed', !this.heatShown)
    this.heatButton.setAttribute('aria-pressed', this.heatShown)
    this.maskButton.setAttribute('aria-pressed', this.maskShown && !!frame?.mask)
    this.sliderButton.disabled = this.heatButton.disabled = !frame
    this.maskButton.disabled = !frame?.mask
    this.batch.hidden = this.frames.length < 2
    this.place.textContent = `${this.index + 1} / ${this.frames.length}`
    this.previous.disabled = this.index === 0
    this.next.disabled = this.index >= this.frames.length - 1
  }

  async renderOutline(frame) {
    const source = this.maskShown ? frame?.mask : ''
    this.outline.hidden = true
    this.outlineSource = source
    if (!source) return
    const mask = new Image()
    mask.src = source
    try {
      await mask.decode()
    } catch {
      return this.giveUp()
    }
    // Another picture may have been chosen meanwhile.
    if (this.outlineSource !== source) return
    drawOutline(this.outline, mask)
    this.outline.hidden = false
  }

  /** Gives the stage the picture's shape, so that it fits into the frame whatever that is. */
  fit() {
    this.stage.style.setProperty('--ratio', this.before.naturalWidth / this.before.naturalHeight)
  }

  giveUp() {
    this.hint.textContent = text('compare_gone')
    this.hint.hidden = false
    this.stage.hidden = true
  }

  startDrag(event) {
    if (event.button !== 0 || this.heatShown) return
    this.stage.setPointerCapture(event.pointerId)
    this.drag(event)
    this.divider.focus({ preventScroll: true })
  }

  drag(event) {
    if (!this.stage.hasPointerCapture(event.pointerId)) return
    // Not offsetX: the canvas may be zoomed.
    const { left, width } = this.stage.getBoundingClientRect()
    this.setSplit((100 * (event.clientX - left)) / width)
  }

  onKey(event) {
    const by = STEPS[event.key]
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return
    event.preventDefault()
    event.stopPropagation()
    this.setSplit(this.split + by)
  }
}

const views = new WeakMap()

function addComparison(node) {
  const view = new CompareView()
  views.set(node, view)
  addView(node, 'comparison', view, MIN_HEIGHT, START_SIZE)
}

addStyle(STYLE)

app.registerExtension({
  name: 'truefill.compare',
  init: readTexts,
  nodeCreated(node) {
    if (node.comfyClass === NODE) addComparison(node)
  },
  // After an undo, after a change of tabs, and for a run picked from the queue.
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) views.get(nodeAt(key))?.show(output)
  }
})
