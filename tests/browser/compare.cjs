// Drives the node Compare (TrueFill) in chromium for test_compare.py (page.cjs says how). A job has
// "shapes": {name: [width, height]}, "change" and "patch": boxes [left, top, right, bottom] in parts of the picture, and
// "colours": numbers for "before", "change" and "patch".
// What is seen goes to standard output as JSON; whether that is right is for the tests to say.
'use strict'

const { drawn, main, ready } = require('./page.cjs')

const RUN = 60_000
const ROOT = '.truefill-compare'

/** Makes the graph: one picture, the same with two boxes painted over and once more as it was, the larger box as the mask. */
function build([[width, height], job]) {
  const { app, LiteGraph } = window
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [0, 0]
  let row = 0
  const add = (type, values, ...inputs) => {
    const node = LiteGraph.createNode(type)
    node.pos = [80, 60 + 60 * row++]
    node.flags.collapsed = true
    app.graph.add(node)
    for (const [name, value] of Object.entries(values)) node.widgets.find((widget) => widget.name === name).value = value
    inputs.forEach((from, slot) => from?.connect(0, node, slot))
    return node
  }
  const inPixels = ([left, top, right, bottom]) => ({
    x: left * width,
    y: top * height,
    width: (right - left) * width,
    height: (bottom - top) * height
  })
  const plain = (size, color) => add('EmptyImage', { width: size.width, height: size.height, batch_size: 1, color })
  const paint = (onto, box, color) => {
    const { x, y, ...size } = inPixels(box)
    return add('ImageCompositeMasked', { x, y, resize_source: false }, onto, plain(size, color))
  }
  const before = plain({ width, height }, job.colours.before)
  const changed = paint(paint(before, job.change, job.colours.change), job.patch, job.colours.patch)
  const after = add('ImageBatch', {}, changed, before)
  const { x, y, ...size } = inPixels(job.change)
  const known = add('SolidMask', { value: 0, width, height })
  const mask = add('MaskComposite', { x, y, operation: 'add' }, known, add('SolidMask', { value: 1, ...size }))
  const compare = add('TrueFillCompare', {}, before, after, mask)
  compare.flags.collapsed = false
  compare.pos = [500, 100]
  return compare.id
}

function look() {
  const root = document.querySelector('.truefill-compare')
  const box = (name) => {
    const { left, top, width, height } = root.querySelector(name).getBoundingClientRect()
    return [left, top, width, height]
  }
  const seen = (name) => root.querySelector(name).checkVisibility()
  const buttons = [...root.querySelectorAll('button')].filter((button) => button.checkVisibility())
  return {
    hint: seen('.truefill-compare-hint') ? root.querySelector('.truefill-compare-hint').textContent : null,
    stage: seen('.truefill-compare-stage') ? box('.truefill-compare-stage') : null,
    frame: box('.truefill-compare-frame'),
    divider: seen('[role="slider"]') ? Number(root.querySelector('[role="slider"]').getAttribute('aria-valuenow')) : null,
    figures: root.querySelector('[role="status"]').textContent,
    enabled: buttons.filter((button) => !button.disabled).map((button) => button.ariaLabel),
    pressed: buttons.filter((button) => button.ariaPressed === 'true').map((button) => button.ariaLabel),
    cut: [root, ...root.querySelectorAll('button, [role="status"]')].filter((part) => part.scrollHeight > part.clientHeight + 2)
      .length
  }
}

/** The whole node and what else the editor shows on it. */
function surroundings() {
  const node = window.app.graph.nodes.find((node) => node.type === 'TrueFillCompare')
  return {
    widgets: node.widgets.map((widget) => widget.name),
    hostImages: node.imgs?.length ?? 0,
    images: document.querySelectorAll(`[data-node-id="${node.id}"] img`).length,
    element: !!document.querySelector(`[data-node-id="${node.id}"]`),
    styles: document.adoptedStyleSheets.filter((sheet) => [...sheet.cssRules].some((rule) => rule.cssText.includes('.truefill-compare')))
      .length,
    widgetsValues: node.serialize().widgets_values ?? []
  }
}

const camera = () => ({ scale: window.app.canvas.ds.scale, offset: [...window.app.canvas.ds.offset] })

const views = () => ({
  nodes: window.app.canvas.graph.nodes.filter((node) => node.type === 'TrueFillCompare').length,
  inPage: document.querySelectorAll('.truefill-compare').length,
  shown: [...document.querySelectorAll('.truefill-compare-stage')].filter((stage) => stage.checkVisibility()).length
})

/** What the editor does for an undo: the nodes are made anew, the outputs of the last run are kept. */
async function undo() {
  const { app } = window
  await app.loadGraphData(app.rootGraph.serialize(), false, false, app.extensionManager.workflow.activeWorkflow)
}

/** Opens the graph's only subgraph. */
function enter() {
  const { app } = window
  app.canvas.setGraph([...app.rootGraph.subgraphs.values()].at(-1))
}

async function shown(page) {
  await page.waitForFunction(
    (root) =>
      [...document.querySelectorAll(`${root} img`)]
        .filter((image) => image.checkVisibility())
        .every((image) => image.complete && image.naturalWidth) &&
      document.querySelector(`${root}-stage`)?.checkVisibility(),
    ROOT,
    { timeout: RUN }
  )
  await drawn(page)
}

async function counted(page, count) {
  await page.waitForFunction(
    ([root, count]) => document.querySelectorAll(root).length === count,
    [ROOT, count],
    { timeout: RUN }
  )
}

async function fresh(page, shape, job) {
  await page.evaluate(() => window.app.graph.clear())
  await counted(page, 0)
  const id = await page.evaluate(build, [shape, job])
  await page.locator(ROOT).waitFor({ timeout: RUN })
  await drawn(page)
  return id
}

async function press(page, name) {
  await page.locator(ROOT).getByRole('button', { name, exact: true }).click()
}

/** Opens a new tab, empty, and comes back. */
async function changeTabs(page) {
  const command = (name) => page.evaluate((name) => window.app.extensionManager.command.execute(name), name)
  const active = () => page.evaluate(() => window.app.extensionManager.workflow.activeWorkflow.path)
  const here = await active()
  await command('Comfy.NewBlankWorkflow')
  await counted(page, 0)
  while ((await active()) !== here) await command('Workspace.PreviousOpenedWorkflow')
}

/** Plays with the slider, the layers and the batch; returns what is seen after each step, with a screenshot of the stage. */
async function play(page, shape, job, prefix) {
  const steps = {}
  const step = async (name) => {
    await shown(page)
    const found = await page.evaluate(look)
    const [x, y, width, height] = found.stage
    found.picture = `${prefix}-${name}.png`
    await page.screenshot({ path: found.picture, clip: { x, y, width, height } })
    steps[name] = found
  }
  await fresh(page, shape, job)
  steps.empty = await page.evaluate(look)
  await page.click('[data-testid="queue-button"]')
  await step('run')
  await page.screenshot({ path: `${prefix}-page.png` })
  const [left, top, width, height] = steps.run.stage
  await page.mouse.move(left + 0.5 * width, top + 0.5 * height)
  await page.mouse.down()
  await page.mouse.move(left + 0.4 * width, top + 0.6 * height)
  await page.mouse.move(left + 0.2 * width, top + 0.6 * height)
  await page.mouse.up()
  await page.mouse.move(left + 0.9 * width, top + 0.6 * height)
  await step('dragged')
  for (const key of ['ArrowRight', 'ArrowRight', 'PageUp']) await page.keyboard.press(key)
  await step('keys')
  await page.keyboard.press('End')
  await step('end')
  await page.keyboard.press('Home')
  await step('home')
  await press(page, 'mask')
  await page.locator(`${ROOT} canvas`).waitFor({ timeout: RUN })
  await step('mask')
  await press(page, 'difference')
  await step('mask-difference')
  await press(page, 'mask')
  await step('difference')
  // There is no divider to move now.
  await page.mouse.click(left + 0.5 * width, top + 0.5 * height)
  await press(page, 'Next picture')
  await step('difference-next')
  await press(page, 'before | after')
  await step('next')
  await press(page, 'Previous picture')
  await step('back')
  return steps
}

/** Copies, removes, undoes, changes tabs and reloads, each on a node that shows pictures. */
async function live(page, shape, job) {
  const found = {}
  await page.evaluate(() => {
    window.executed = 0
    const type = window.LiteGraph.registered_node_types.TrueFillCompare
    type.prototype.onExecuted = () => window.executed++
  })
  const id = await fresh(page, shape, job)
  await page.click('[data-testid="queue-button"]')
  await shown(page)
  found.executed = await page.evaluate(() => window.executed)
  found.surroundings = await page.evaluate(surroundings)
  found.prompt = await page.evaluate(async (id) => (await window.app.graphToPrompt()).output[id].inputs, id)

  const { stage } = await page.evaluate(look)
  await page.mouse.move(stage[0] + 30, stage[1] + 30)
  found.views = [await page.evaluate(camera)]
  await page.mouse.down({ button: 'middle' })
  await page.mouse.move(stage[0] + 50, stage[1] + 70, { steps: 4 })
  await page.mouse.up({ button: 'middle' })
  found.views.push(await page.evaluate(camera))
  await page.mouse.wheel(0, -100)
  await page.waitForFunction((scale) => window.app.canvas.ds.scale !== scale, found.views[1].scale, { timeout: RUN })
  found.views.push(await page.evaluate(camera))

  await page.evaluate((id) => {
    const { app } = window
    app.canvas.selectItems([app.graph.getNodeById(id)])
    app.canvas.copyToClipboard()
    app.canvas.pasteFromClipboard()
  }, id)
  await counted(page, 2)
  found.copied = await page.evaluate(views)
  await page.evaluate((id) => {
    const { graph } = window.app
    graph.remove(graph.nodes.find((node) => node.type === 'TrueFillCompare' && node.id !== id))
  }, id)
  await counted(page, 1)
  found.removed = await page.evaluate(views)

  await page.evaluate(undo)
  await shown(page)
  found.undone = await page.evaluate(views)

  await changeTabs(page)
  await shown(page)
  found.otherTab = await page.evaluate(views)

  await page.evaluate(async () => {
    const { app } = window
    const node = app.graph.nodes.find((node) => node.type === 'TrueFillCompare')
    const made = app.graph.convertToSubgraph(new Set([node]))
    // It keeps its id, so what the last run left would be found too.
    delete app.nodeOutputs[node.id]
    app.canvas.openSubgraph(made.subgraph, made.node)
  })
  await page.locator(`${ROOT}-hint`).waitFor({ timeout: RUN })
  await page.click('[data-testid="queue-button"]')
  await shown(page)
  found.inSubgraph = await page.evaluate(views)
  await page.evaluate(undo)
  await page.evaluate(enter)
  await shown(page)
  found.undoneInSubgraph = await page.evaluate(views)
  await changeTabs(page)
  await page.evaluate(enter)
  await shown(page)
  found.otherTabInSubgraph = await page.evaluate(views)

  // The file is asked for again, and is not there.
  await page.evaluate(() => {
    const gone = [{ filename: 'gone.png', subfolder: '', type: 'temp' }]
    const node = window.app.canvas.graph.nodes.find((node) => node.type === 'TrueFillCompare')
    node.onExecuted({ before: gone, after: gone, heat: gone, text: [''] })
  })
  await page.locator(`${ROOT}-hint`).waitFor({ timeout: RUN })
  found.gone = await page.evaluate(look)
  await page.reload()
  await ready(page)
  await page.locator(ROOT).waitFor({ timeout: RUN })
  found.reloaded = await page.evaluate(look)
  return found
}

main(async (page, job, report) => {
  const mode = job.nodes2 ? 'nodes2' : 'classic'
  report.played = {}
  for (const [name, shape] of Object.entries(job.shapes)) {
    report.played[name] = await play(page, shape, job, `${job.pictures}/compare-${name}-${mode}`)
  }
  report.live = await live(page, Object.values(job.shapes)[0], job)
})
