// Drives the editor of points and boxes in chromium for test_points.py (page.cjs says how). A job has "photos": {name: file in
// ComfyUI's input folder}, "segmenter": file, "places": {name: [x, y] in parts of the picture}.
// What is seen goes to standard output as JSON; whether that is right is for the tests to say.
'use strict'

const { drawn, main, ready } = require('./page.cjs')

const RUN = 60_000
const ROOT = '.truefill-points'
const STAGE = `${ROOT}-stage`

/** Load Image and, connected to it, a node with the editor; returns the latter's id. */
function build([file, type, values]) {
  const { app, LiteGraph } = window
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [0, 0]
  const loader = LiteGraph.createNode('LoadImage')
  loader.pos = [40, 100]
  app.graph.add(loader)
  loader.widgets.find((widget) => widget.name === 'image').value = file
  const node = LiteGraph.createNode(type)
  node.pos = [450, 100]
  app.graph.add(node)
  loader.connect(0, node, node.inputs.findIndex((input) => input.name === 'image'))
  // The editor keeps the values of widgets by the number of their node, which a cleared graph gives out again.
  const all = { include: '', exclude: '', drawn: '', ...values }
  for (const [name, value] of Object.entries(all)) node.widgets.find((widget) => widget.name === name).value = value
  return node.id
}

function addSegmenter([id, file]) {
  const { app, LiteGraph } = window
  const loader = LiteGraph.createNode('TrueFillLoadSegmenter')
  loader.pos = [40, 700]
  app.graph.add(loader)
  loader.widgets[0].value = file
  const node = app.graph.getNodeById(id)
  loader.connect(0, node, node.inputs.findIndex((input) => input.name === 'segmenter'))
  const shown = LiteGraph.createNode('MaskPreview')
  shown.pos = [1000, 100]
  app.graph.add(shown)
  node.connect(0, shown, 0)
}

function addOutput(id) {
  const { app, LiteGraph } = window
  const shown = LiteGraph.createNode('PreviewAny')
  shown.pos = [1000, 100]
  app.graph.add(shown)
  app.graph.getNodeById(id).connect(0, shown, 0)
}

/** What is in the texts, and what is drawn, of the node with this id, or of the graph's only one with the editor. */
function look(id) {
  const nodes = window.app.canvas.graph.nodes.filter((node) => node.widgets?.some((widget) => widget.name === 'points'))
  const node = nodes.find((node) => node.id === id) ?? nodes[0]
  const value = (name) => node.widgets.find((widget) => widget.name === name).value
  const root = node.widgets.find((widget) => widget.name === 'points').element
  const stage = root.querySelector('.truefill-points-stage')
  const { left, top, width, height } = stage.getBoundingClientRect()
  const frame = root.querySelector('.truefill-points-frame').getBoundingClientRect()
  const seen = (part) => part.checkVisibility()
  const middle = (mark) => {
    const box = mark.getBoundingClientRect()
    return [(box.left + box.width / 2 - left) / width, (box.top + box.height / 2 - top) / height]
  }
  return {
    include: value('include'),
    exclude: value('exclude'),
    drawn: value('drawn'),
    stage: seen(stage) ? [left, top, width, height] : null,
    frame: [frame.left, frame.top, frame.width, frame.height],
    hint: seen(root.querySelector('.truefill-points-hint')) ? root.querySelector('.truefill-points-hint').textContent : null,
    marks: [...root.querySelectorAll('.truefill-points-mark')].map((mark) => [mark.dataset.field, ...middle(mark)]),
    boxes: root.querySelectorAll('.truefill-points-box').length,
    mask: seen(root.querySelector('.truefill-points-mask')),
    menus: [...document.querySelectorAll('.litecontextmenu, .p-contextmenu, [role="menu"]')].filter(seen).length,
    selected: window.app.canvas.selectedItems?.size ?? 0,
    position: [...node.pos],
    widgetsValues: node.serialize().widgets_values
  }
}

async function shown(page) {
  await page.waitForFunction(
    ([root]) => {
      const stages = [...document.querySelectorAll(`${root}-stage`)].filter((stage) => stage.checkVisibility())
      return stages.length && stages.every((stage) => {
        const image = stage.querySelector('img')
        return image.complete && image.naturalWidth
      })
    },
    [ROOT],
    { timeout: RUN }
  )
  // It looks at the texts four times a second.
  await page.waitForTimeout(350)
  await drawn(page)
}

async function fresh(page, file, type, values = {}) {
  await page.evaluate(() => window.app.graph.clear())
  await page.waitForFunction((root) => !document.querySelector(root), ROOT, { timeout: RUN })
  const id = await page.evaluate(build, [file, type, values])
  await page.locator(ROOT).waitFor({ timeout: RUN })
  await shown(page)
  return id
}

const at = ([left, top, width, height], [x, y]) => [left + x * width, top + y * height]

async function click(page, place, options = {}) {
  const { stage } = await page.evaluate(look)
  const { shift, ...rest } = options
  if (shift) await page.keyboard.down('Shift')
  await page.mouse.click(...at(stage, place), rest)
  if (shift) await page.keyboard.up('Shift')
  await drawn(page)
}

async function drag(page, from, to) {
  const { stage } = await page.evaluate(look)
  await page.mouse.move(...at(stage, from))
  await page.mouse.down()
  await page.mouse.move(...at(stage, to), { steps: 5 })
  await page.mouse.up()
  await drawn(page)
}

/** Points, boxes, zooms and keys on one picture. */
async function play(page, file, places, prefix) {
  const steps = {}
  const step = async (name) => (steps[name] = await page.evaluate(look))
  await fresh(page, file, 'TrueFillPoints')
  await step('start')
  await click(page, places.one)
  await step('one')
  await click(page, places.two, { shift: true })
  await click(page, places.three, { button: 'right' })
  await step('excluded')
  await drag(page, places.from, places.to)
  await step('box')
  await page.screenshot({ path: `${prefix}-page.png` })
  await page.keyboard.press('ArrowRight')
  await page.keyboard.press('Shift+ArrowDown')
  await step('nudged')
  await page.keyboard.press('Delete')
  await step('deleted')
  await page.keyboard.press('Control+z')
  await step('undone')
  await click(page, places.one)
  await step('removed')
  await page.keyboard.press('Control+z')
  await step('back')

  for (const scale of [0.6, 1.4]) {
    await page.evaluate((scale) => {
      window.app.canvas.ds.scale = scale
      window.app.canvas.setDirty(true, true)
    }, scale)
    await page.waitForTimeout(200)
    await drawn(page)
    await click(page, places.four)
    await step(`canvas ${scale}`)
    await page.keyboard.press('Control+z')
  }
  await page.evaluate(() => {
    window.app.canvas.ds.scale = 1
    window.app.canvas.setDirty(true, true)
  })
  await page.waitForTimeout(200)

  const before = await step('before zoom')
  const spot = at(before.stage, places.four)
  await page.mouse.move(...spot)
  for (let turn = 0; turn < 5; turn++) await page.mouse.wheel(0, -100)
  await page.waitForTimeout(200)
  await step('zoomed')
  await page.mouse.click(...spot)
  await step('zoomed click')
  await page.keyboard.press('0')
  const whole = await step('whole')
  await page.keyboard.press('+')
  await step('plus')
  await page.keyboard.press('-')
  await step('minus')
  await page.mouse.move(...at(whole.stage, places.from))
  await page.mouse.down()
  await page.mouse.move(...at(whole.stage, places.four), { steps: 5 })
  await page.keyboard.press('Escape')
  await page.mouse.up()
  await drawn(page)
  await step('escaped')
  await page.getByRole('button', { name: 'clear', exact: true }).click()
  await step('cleared')
  await page.getByRole('button', { name: 'undo', exact: true }).click()
  await step('uncleared')
  return steps
}

/** Copies, reloads, several nodes, a subgraph, a run. */
async function live(page, job) {
  const found = {}
  const values = { include: '[{"x":10,"y":20}]', exclude: '[{"x":3,"y":4}]', drawn: '[{"x":1,"y":2,"width":30,"height":40}]' }
  const [file] = Object.values(job.photos)
  const id = await fresh(page, file, 'TrueFillPoints', values)
  found.given = await page.evaluate(look)
  await page.evaluate(addOutput, id)
  found.prompt = await page.evaluate(async (id) => (await window.app.graphToPrompt()).output[id].inputs, id)

  const copyId = await page.evaluate((id) => {
    const { app } = window
    app.canvas.selectItems([app.graph.getNodeById(id)])
    app.canvas.copyToClipboard()
    app.canvas.pasteFromClipboard()
    const copy = app.graph.nodes.find((node) => node.type === 'TrueFillPoints' && node.id !== id)
    copy.pos = [1400, 100]
    app.graph.nodes.find((node) => node.type === 'LoadImage').connect(0, copy, 0)
    app.canvas.deselectAll()
    return copy.id
  }, id)
  await page.waitForFunction((root) => document.querySelectorAll(root).length === 2, ROOT, { timeout: RUN })
  await shown(page)
  await page.mouse.click(...at((await page.evaluate(look, id)).stage, job.places.two))
  await drawn(page)
  found.clicked = await page.evaluate(look, id)
  found.copy = await page.evaluate(look, copyId)
  await page.evaluate((id) => {
    const { graph } = window.app
    graph.remove(graph.nodes.find((node) => node.type === 'TrueFillPoints' && node.id !== id))
  }, id)

  await page.evaluate(async () => {
    const { app } = window
    await app.loadGraphData(app.rootGraph.serialize(), false, false, app.extensionManager.workflow.activeWorkflow)
  })
  await shown(page)
  found.loaded = await page.evaluate(look)

  await page.click('[data-testid="queue-button"]')
  await page.waitForFunction(() => Object.keys(window.app.nodeOutputs).length > 0, undefined, { timeout: RUN })
  found.ran = await page.evaluate(look)

  await page.evaluate(() => {
    const { app } = window
    const node = app.graph.nodes.find((node) => node.type === 'TrueFillPoints')
    const made = app.graph.convertToSubgraph(new Set([node]))
    app.canvas.openSubgraph(made.subgraph, made.node)
  })
  await page.waitForTimeout(500)
  found.inSubgraph = await page.evaluate(look)
  return found
}

/** Segment with a model: its mask lies over the picture. */
async function segment(page, job, prefix) {
  const found = {}
  const [file] = Object.values(job.photos)
  const id = await fresh(page, file, 'TrueFillSegment')
  await page.evaluate(addSegmenter, [id, job.segmenter])
  await click(page, job.places.one)
  found.before = await page.evaluate(look)
  await page.click('[data-testid="queue-button"]')
  await page.waitForFunction((root) => document.querySelector(`${root}-mask`).checkVisibility(), ROOT, { timeout: RUN })
  await page.evaluate(async (root) => {
    const image = new Image()
    image.src = /url\("(.*)"\)/.exec(document.querySelector(`${root}-mask`).style.maskImage)[1]
    await image.decode()
  }, ROOT)
  await shown(page)
  const picture = async (name) => {
    const seen = await page.evaluate(look)
    const [x, y, width, height] = seen.stage
    seen.picture = `${prefix}-${name}.png`
    await page.screenshot({ path: seen.picture, clip: { x, y, width, height } })
    return seen
  }
  found.after = await picture('mask')
  await page.screenshot({ path: `${prefix}-segment.png` })
  await page.getByRole('button', { name: 'mask', exact: true }).click()
  found.hidden = await picture('no-mask')
  found.file = await page.evaluate(
    (id) => (window.app.nodeOutputs[id] ?? Object.values(window.app.nodeOutputs)[0]).mask[0],
    id
  )
  await click(page, job.places.two)
  found.again = await page.evaluate(look)

  const entry = 'Open the picture in MaskEditor'
  found.menu = await page.evaluate(
    ([id, entry]) => {
      const { app } = window
      const offered = (node) => app.canvas.getNodeMenuOptions(node).find((option) => option?.content === entry)
      const { graph } = app
      offered(graph.getNodeById(id)).callback()
      return graph.nodes.filter(offered).map((node) => node.type)
    },
    [id, entry]
  )
  const editor = page.locator('[class*="mask-editor" i], [class*="maskeditor" i]').filter({ visible: true })
  await editor.first().waitFor({ timeout: RUN })
  await page.screenshot({ path: `${prefix}-mask-editor.png` })
  await page.reload()
  await ready(page)
  return found
}

main(async (page, job, report) => {
  const mode = job.nodes2 ? 'nodes2' : 'classic'
  report.played = {}
  for (const [name, file] of Object.entries(job.photos)) {
    report.played[name] = await play(page, file, job.places, `${job.pictures}/points-${name}-${mode}`)
  }
  report.segment = await segment(page, job, `${job.pictures}/points-${mode}`)
  report.live = await live(page, job)
})
