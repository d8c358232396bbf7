// The editor on Segment and Points (TrueFill): click on the picture instead of writing coordinates.
import { app } from '../../scripts/app.js'
import { addStyle, addView, address, button, forwardToCanvas, maker, nodeAt, point } from './dom.js'
import { readTexts, text } from './texts.js'

const NODES = ['TrueFillSegment', 'TrueFillPoints']
/** ComfyUI's nodes whose widget `image` names the file that they show. */
const LOADERS = ['LoadImage']
const FIELDS = ['include', 'exclude', 'drawn']
const START_SIZE = [420, 560]
const MIN_HEIGHT = 260
// In pixels of the canvas: a thinner picture is shown thicker than it is, so that one can click on it.
const THIN = 24
// The widgets' texts and the pictures of other nodes change in many ways; none of them tells the others.
const LOOK_EVERY = 250
// In pixels of the screen: a longer way is a box, a shorter distance is on the mark.
const DRAG = 5
const NEAR = 8
const ZOOM = { step: 1.25, most: 16 }
const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }

const STYLE = `
.truefill-points { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; width: 100%; min-width: 0;
  min-height: ${MIN_HEIGHT}px; overflow: hidden; color: var(--input-text, #ddd); font: 12px/1.4 sans-serif; }
.truefill-points [hidden] { display: none; }
.truefill-points-bar { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; }
.truefill-points-count { margin-left: auto; white-space: nowrap; }
.truefill-points button { height: 26px; margin: 0; padding: 0 9px; cursor: pointer; white-space: nowrap;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 5px; background: var(--comfy-input-bg, #222);
  color: inherit; font: inherit; }
.truefill-points button:hover:enabled { filter: brightness(1.2); }
.truefill-points button:disabled { opacity: 0.45; cursor: default; }
.truefill-points button[aria-pressed="true"] { border-color: #2a7fd0; background: #1f6fbf; color: #fff; }
.truefill-points :focus-visible { outline: 2px solid #4da3ff; outline-offset: -2px; }
.truefill-points-frame { flex: 1 1 0; display: grid; place-items: center; min-height: 0; overflow: hidden;
  container-type: size; border-radius: 5px; background: var(--comfy-input-bg, #222); }
.truefill-points-hint { margin: 0; padding: 12px; text-align: center; opacity: 0.8; }
.truefill-points-stage { --zoom: 1; --x: 0px; --y: 0px; position: relative; cursor: crosshair; touch-action: none;
  width: calc(max(${THIN}px, min(100cqw, 100cqh * var(--ratio))) * var(--zoom));
  height: calc(max(${THIN}px, min(100cqh, 100cqw / var(--ratio))) * var(--zoom));
  transform: translate(var(--x), var(--y)); user-select: none; }
.truefill-points-stage img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; margin: 0;
  pointer-events: none; }
.truefill-points-mask { position: absolute; inset: 0; background: #00e5ff; opacity: 0.45; pointer-events: none;
  mask-size: 100% 100%; mask-mode: luminance; }
.truefill-points-mark, .truefill-points-box { position: absolute; box-sizing: border-box; pointer-events: none; }
.truefill-points-mark { width: 12px; height: 12px; margin: -6px 0 0 -6px; border: 2px solid #fff; border-radius: 50%;
  box-shadow: 0 0 3px #000; }
.truefill-points-mark[data-field="include"] { background: #1faa3c; }
.truefill-points-mark[data-field="exclude"] { background: #d92a2a; }
.truefill-points-box { border: 2px solid #ffd33d; box-shadow: 0 0 2px #000; }
`

const make = maker('truefill-points')

/** The list that a widget's value holds; null where it holds something else. */
function parsed(value) {
  if (!value?.trim()) return []
  try {
    const found = JSON.parse(value)
    return Array.isArray(found) ? found : null
  } catch {
    return null
  }
}

const written = (list) => (list.length ? JSON.stringify(list) : '')

/** Where the picture of Load Image lies, for its widget's value: "folder/name.png [input]". */
function inputFile(value) {
  const [, path, type] = /^(.*?)(?: \[(\w+)\])?$/.exec(value)
  const slash = path.lastIndexOf('/')
  return { filename: path.slice(slash + 1), subfolder: slash < 0 ? '' : path.slice(0, slash), type: type ?? 'input' }
}

/** The node that feeds a node's input of this name. */
function feeding(node, name) {
  const slot = node.graph ? node.inputs.findIndex((input) => input.name === name) : -1
  return slot < 0 ? null : node.getInputNode(slot)
}

/** What the widget shows; `element` is its root. */
class PointsEditor {
  history = []
  order = []
  result = {}
  maskShown = true
  zoom = 1
  pan = [0, 0]
  shown = ''

  constructor(node) {
    this.node = node
    this.buildBar()
    this.buildStage()
    this.hint = make('p', 'hint')
    this.element = make('div', '', {}, this.bar, make('div', 'frame', {}, this.hint, this.stage))
    this.element.className = 'truefill-points'
    forwardToCanvas(this.element, (event) => this.onWheel(event))
    this.render()
    this.timer = setInterval(() => this.refresh(), LOOK_EVERY)
  }

  stop() {
    clearInterval(this.timer)
  }

  buildBar() {
    const nothing = { include: [], exclude: [], drawn: [] }
    this.undoButton = button(text('undo'), text('undo_title'), () => this.undo())
    this.clearButton = button(text('clear'), text('clear_title'), () => this.change(nothing))
    this.maskButton = button(text('mask'), text('mask_over_picture'), () => {
      this.maskShown = !this.maskShown
      this.render()
    })
    this.count = make('span', 'count', { role: 'status' })
    this.bar = make('div', 'bar', {}, this.undoButton, this.clearButton, this.maskButton, this.count)
    this.bar.addEventListener('keydown', (event) => {
      if (event.key === ' ' || event.key === 'Enter') event.stopPropagation()
    })
  }

  buildStage() {
    this.picture = make('img', '', { alt: text('picture'), draggable: false })
    this.mask = make('div', 'mask')
    this.marks = make('div', 'marks')
    this.stage = make('div', 'stage', {
      tabIndex: 0,
      title: text('points_help'),
      role: 'application',
      'aria-label': text('points_help'),
      // Nodes 2.0 leaves the wheel to what has the focus and says so.
      'data-capture-wheel': 'true'
    })
    this.stage.append(this.picture, this.mask, this.marks)
    // By this the editor knows what has a history of its own, and leaves Ctrl+Z to it.
    this.stage.type = 'textarea'
    this.picture.addEventListener('load', () => this.render())
    this.picture.addEventListener('error', () => this.giveUp())
    this.stage.addEventListener('pointerdown', (event) => this.onDown(event))
    this.stage.addEventListener('pointermove', (event) => this.onMove(event))
    this.stage.addEventListener('pointerup', (event) => this.onUp(event))
    this.stage.addEventListener('pointercancel', () => this.cancel())
    this.stage.addEventListener('contextmenu', (event) => {
      event.preventDefault()
      event.stopPropagation()
    })
    this.stage.addEventListener('keydown', (event) => this.onKey(event))
  }

  field(name) {
    return this.node.widgets?.find((widget) => widget.name === name)
  }

  lists() {
    return Object.fromEntries(FIELDS.map((name) => [name, parsed(this.field(name)?.value) ?? []]))
  }

  texts() {
    return FIELDS.map((name) => this.field(name)?.value ?? '')
  }

  /** Writes the lists that are given into their widgets; one step for undo. */
  change(lists) {
    this.history.push({ texts: this.texts(), order: [...this.order] })
    for (const [name, list] of Object.entries(lists)) this.write(name, written(list))
    this.render()
  }

  write(name, value) {
    const widget = this.field(name)
    if (!widget || widget.value === value) return
    widget.value = value
    widget.callback?.(value)
    this.node.setDirtyCanvas?.(true, true)
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
    // Its older name is checkState.
    ;(tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker)
  }

  undo() {
    const before = this.history.pop()
    if (!before) return
    FIELDS.forEach((name, index) => this.write(name, before.texts[index]))
    this.order = before.order
    this.render()
  }

  add(name, mark) {
    this.change({ [name]: [...this.lists()[name], mark] })
    this.order.push(name)
  }

  /** The field whose last entry was made last. */
  lastField() {
    const lists = this.lists()
    while (this.order.length && !lists[this.order.at(-1)].length) this.order.pop()
    return this.order.at(-1) ?? FIELDS.find((name) => lists[name].length)
  }

  /** Shows what a run has left: the node's `ui` result. */
  show(output) {
    if (!output?.picture?.length) return
    this.result = { picture: address(output.picture[0]), mask: address(output.mask?.[0]), of: this.upstream() }
    this.refresh()
  }

  /** The address of the picture that the connected node shows, '' where it shows none. */
  upstream() {
    const origin = feeding(this.node, 'image')
    const value = LOADERS.includes(origin?.comfyClass) && origin.widgets?.find((widget) => widget.name === 'image')?.value
    if (value) return address(inputFile(value))
    return origin?.imgs?.[0]?.src ?? ''
  }

  refresh() {
    const source = this.upstream() || this.result.picture || ''
    const state = JSON.stringify([source, this.result, ...this.texts()])
    if (state === this.state) return
    this.state = state
    this.source = source
    this.render()
  }

  render() {
    point(this.picture, this.source)
    const loaded = !!this.source && this.picture.complete && this.picture.naturalWidth > 0
    this.hint.textContent = text('points_run_first')
    this.hint.hidden = !!this.source
    this.stage.hidden = !this.source
    // A mask belongs to the picture of its run.
    const mask = this.result.mask && this.result.of === this.upstream() ? this.result.mask : ''
    this.mask.hidden = !mask || !this.maskShown
    this.mask.style.maskImage = mask ? `url("${mask}")` : ''
    const lists = this.lists()
    const total = FIELDS.reduce((sum, name) => sum + lists[name].length, 0)
    this.undoButton.disabled = !this.history.length
    this.clearButton.disabled = !total
    this.maskButton.disabled = !mask
    this.maskButton.setAttribute('aria-pressed', !!mask && this.maskShown)
    this.count.textContent = `+${lists.include.length}  \u2212${lists.exclude.length}  \u25a1${lists.drawn.length}`
    if (loaded) this.renderMarks(lists)
  }

  renderMarks(lists) {
    const { naturalWidth: width, naturalHeight: height } = this.picture
    this.stage.style.setProperty('--ratio', width / height)
    const percent = (value, side) => `${(100 * value) / side}%`
    const boxes = [...lists.drawn, ...(this.drag?.box ? [this.drag.box] : [])].map((box) => {
      const mark = make('div', 'box')
      mark.style.left = percent(box.x, width)
      mark.style.top = percent(box.y, height)
      mark.style.width = percent(box.width, width)
      mark.style.height = percent(box.height, height)
      return mark
    })
    const points = ['include', 'exclude'].flatMap((name) =>
      lists[name].map(({ x, y }) => {
        const mark = make('div', 'mark')
        mark.dataset.field = name
        mark.style.left = percent(x + 0.5, width)
        mark.style.top = percent(y + 0.5, height)
        return mark
      })
    )
    this.marks.replaceChildren(...boxes, ...points)
  }

  giveUp() {
    this.hint.textContent = text('points_gone')
    this.hint.hidden = false
    this.stage.hidden = true
  }

  /** The pixel of the picture under the pointer; wherever the canvas and the picture are zoomed to. */
  pixel(event) {
    const { left, top, width, height } = this.stage.getBoundingClientRect()
    const { naturalWidth, naturalHeight } = this.picture
    const within = (share, side) => Math.min(Math.max(Math.floor(share * side), 0), side - 1)
    return {
      x: within((event.clientX - left) / width, naturalWidth),
      y: within((event.clientY - top) / height, naturalHeight)
    }
  }

  /** The mark under the pointer: its field and its place in the list. */
  markAt(event) {
    const { left, top, width, height } = this.stage.getBoundingClientRect()
    const lists = this.lists()
    for (const name of ['include', 'exclude']) {
      const index = lists[name].findIndex(({ x, y }) => {
        const across = left + ((x + 0.5) / this.picture.naturalWidth) * width - event.clientX
        const down = top + ((y + 0.5) / this.picture.naturalHeight) * height - event.clientY
        return Math.hypot(across, down) <= NEAR
      })
      if (index >= 0) return [name, index]
    }
    return null
  }

  onDown(event) {
    if (event.button !== 0 && event.button !== 2) return
    event.stopPropagation()
    this.stage.setPointerCapture(event.pointerId)
    this.stage.focus({ preventScroll: true })
    const exclude = event.button === 2 || event.shiftKey
    this.drag = { exclude, from: this.pixel(event), start: [event.clientX, event.clientY] }
  }

  onMove(event) {
    if (!this.drag || this.drag.exclude) return
    const [x, y] = this.drag.start
    if (!this.drag.box && Math.hypot(event.clientX - x, event.clientY - y) < DRAG) return
    const to = this.pixel(event)
    const { from } = this.drag
    this.drag.box = {
      x: Math.min(from.x, to.x),
      y: Math.min(from.y, to.y),
      width: Math.abs(to.x - from.x) + 1,
      height: Math.abs(to.y - from.y) + 1
    }
    this.render()
  }

  onUp(event) {
    const drag = this.drag
    if (!drag) return
    event.stopPropagation()
    this.drag = null
    if (drag.box) return this.add('drawn', drag.box)
    const hit = this.markAt(event)
    if (!hit) return this.add(drag.exclude ? 'exclude' : 'include', drag.from)
    const [name, index] = hit
    this.change({ [name]: this.lists()[name].toSpliced(index, 1) })
  }

  cancel() {
    this.drag = null
    this.render()
  }

  onKey(event) {
    if (event.key.toLowerCase() === 'z' && (event.ctrlKey || event.metaKey) && !event.shiftKey) this.undo()
    else if (event.ctrlKey || event.metaKey || event.altKey) return
    else if (event.key === 'Delete' || event.key === 'Backspace') this.removeLast()
    else if (event.key === 'Escape') this.cancel()
    else if (event.key === '+' || event.key === '=') this.zoomBy(ZOOM.step)
    else if (event.key === '-') this.zoomBy(1 / ZOOM.step)
    else if (event.key === '0') this.zoomBy(0)
    else if (NUDGES[event.key]) this.nudge(NUDGES[event.key], event.shiftKey ? 10 : 1)
    else return
    event.preventDefault()
    event.stopPropagation()
  }

  removeLast() {
    const name = this.lastField()
    if (name) this.change({ [name]: this.lists()[name].slice(0, -1) })
  }

  nudge([dx, dy], by) {
    const name = this.lastField()
    if (!name) return
    const list = this.lists()[name]
    const mark = list.at(-1)
    const move = (value, step, side) => Math.min(Math.max(value + by * step, 0), side)
    const moved = {
      ...mark,
      x: move(mark.x, dx, this.picture.naturalWidth - (mark.width ?? 1)),
      y: move(mark.y, dy, this.picture.naturalHeight - (mark.height ?? 1))
    }
    this.change({ [name]: [...list.slice(0, -1), moved] })
  }

  /** Over the picture, once it was clicked on, the wheel zooms into it; returns whether it did. */
  onWheel(event) {
    if (document.activeElement !== this.stage || !this.stage.contains(event.target)) return false
    event.preventDefault()
    event.stopPropagation()
    this.zoomBy(event.deltaY < 0 ? ZOOM.step : 1 / ZOOM.step, event)
    return true
  }

  /** Zooms by a factor and keeps the pixel under the pointer where it is; by 0: the whole picture. */
  zoomBy(factor, event) {
    const before = this.stage.getBoundingClientRect()
    const x = event?.clientX ?? before.left + before.width / 2
    const y = event?.clientY ?? before.top + before.height / 2
    const share = [(x - before.left) / before.width, (y - before.top) / before.height]
    this.zoom = factor ? Math.min(Math.max(this.zoom * factor, 1), ZOOM.most) : 1
    if (this.zoom === 1) this.pan = [0, 0]
    this.place()
    if (this.zoom === 1) return
    const after = this.stage.getBoundingClientRect()
    // Pixels of the screen for one of the element.
    const scale = after.width / this.stage.offsetWidth || 1
    this.pan[0] += (x - after.left - share[0] * after.width) / scale
    this.pan[1] += (y - after.top - share[1] * after.height) / scale
    this.place()
  }

  place() {
    const { style } = this.stage
    style.setProperty('--zoom', this.zoom)
    style.setProperty('--x', `${this.pan[0]}px`)
    style.setProperty('--y', `${this.pan[1]}px`)
  }
}

const editors = new WeakMap()

function addEditor(node) {
  const editor = new PointsEditor(node)
  editors.set(node, editor)
  addView(node, 'points', editor, MIN_HEIGHT, START_SIZE)
  const onRemoved = node.onRemoved
  node.onRemoved = function (...rest) {
    editor.stop()
    onRemoved?.apply(this, rest)
  }
}

addStyle(STYLE)

app.registerExtension({
  name: 'truefill.points',
  init: readTexts,
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addEditor(node)
  },
  // After an undo, after a change of tabs, and for a run picked from the queue.
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) editors.get(nodeAt(key))?.show(output)
  },
  getNodeMenuItems(node) {
    const loader = NODES.includes(node.comfyClass) ? feeding(node, 'image') : null
    if (!LOADERS.includes(loader?.comfyClass)) return []
    return [
      {
        content: text('open_mask_editor'),
        callback: () => {
          app.canvas.selectItems([loader])
          app.extensionManager.command.execute('Comfy.MaskEditor.OpenMaskEditor')
        }
      }
    ]
  }
})
