// Drives the editor in chromium for test_editor.py (page.cjs says how): a job has "graphs": [{"name", "file", "id", "changes"}] and "help".
// Drops the graphs that have `changes` (node type, widget, value) on the canvas as a person would, sets these widgets and runs them;
// then drops every graph's file in a fresh page, and opens the help pages of some node types. What is seen goes to standard output as
// JSON; whether that is right is for the tests to say.
'use strict'

const { READY, answered, change, drawn, main, ready } = require('./page.cjs')

const SHOW = 15_000
const NOTE = '.comfy-markdown .tiptap, .comfy-markdown-content'
const RUN = 180_000

async function drop(page, file) {
  // The browser's own drag of a file from outside: the page reads the real file, as it does from a file manager.
  const session = await page.context().newCDPSession(page)
  // Where no graph has a node: some nodes take files for themselves.
  const place = { x: 1600, y: 560 }
  const data = { items: [], files: [file], dragOperationsMask: 1 }
  for (const type of ['dragEnter', 'dragOver', 'drop']) {
    await session.send('Input.dispatchDragEvent', { type, ...place, data })
  }
  await session.detach()
}

const seen = () => {
  const { app, LiteGraph } = window
  const nodes = app.graph.nodes.map((node) => {
    // The classic canvas has no element for a node. In both modes a node grows until its title fits.
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const rect = element?.getBoundingClientRect()
    const [x, y, width, height] = node.boundingRect
    return {
      id: String(node.id),
      type: node.type,
      broken: !!node.has_errors || !LiteGraph.registered_node_types[node.type],
      element: !!element,
      box: rect ? [rect.left, rect.top, rect.right, rect.bottom] : [x, y, x + width, y + height]
    }
  })
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((part) => part.checkVisibility())
  const notes = shown('.comfy-markdown .tiptap, .comfy-markdown-content')
  const cut = [...notes, ...shown('textarea:not(.comfy-markdown *)')]
    .filter((part) => part.scrollHeight > part.clientHeight + 1)
    .map((part) => part.value || part.innerText)
  const dialogs = shown('[role="dialog"], .p-dialog').map((dialog) => dialog.innerText)
  return { nodes, dialogs, cut, notes: notes.map((note) => note.innerText) }
}

const picture = ([id, nodes2, before]) => {
  const image = nodes2
    ? document.querySelector(`[data-node-id="${id}"] img`)
    : window.app.graph.getNodeById(id).imgs?.[0]
  return image?.complete && image.naturalWidth && image.src !== before
    ? { source: image.src, width: image.naturalWidth, height: image.naturalHeight }
    : null
}

async function run(page, changes, { nodes2, address }) {
  await change(page, changes)
  const saveId = await page.evaluate(() => {
    const save = window.app.graph.nodes.filter((node) => node.type === 'SaveImage').at(-1)
    // A picture that is not in view is not loaded.
    window.app.canvas.centerOnNode(save)
    return save.id
  })
  // Nodes 2.0 still shows what the graph before it made.
  const before = (await page.evaluate(picture, [saveId, nodes2]))?.source
  await page.click('[data-testid="queue-button"]')
  const result = await page.waitForFunction(picture, [saveId, nodes2, before], { timeout: RUN })
  // What a run still has to say the editor would show on the next graph's nodes of the same numbers.
  await answered(address, '/queue', ({ queue_running, queue_pending }) => !queue_running.length && !queue_pending.length, RUN)
  return result.jsonValue()
}

async function help(page, type) {
  const title = await page.evaluate((type) => {
    let node = window.app.graph.nodes.find((node) => node.type === type)
    if (!node) {
      node = window.LiteGraph.createNode(type)
      // Its title where the last graph has nothing and the open side panel does not reach. Not where the last one was: two
      // clicks in one place are a double click, which renames the node.
      window.turn = 1 - (window.turn ?? 0)
      node.pos = [430 + 150 * window.turn, 670]
      if (window.added) window.app.graph.remove(window.added)
      window.added = window.app.graph.add(node) && node
    }
    const { scale, offset } = window.app.canvas.ds
    const { left, top } = window.app.canvas.canvas.getBoundingClientRect()
    // A little into the title bar, which lies above the node's own corner.
    return [left + (node.pos[0] + offset[0] + 120) * scale, top + (node.pos[1] + offset[1] - 15) * scale]
  }, type)
  await drawn(page)
  await page.mouse.click(...title)
  await page.click('[data-testid="info-button"]', { timeout: SHOW })
  const content = page.locator('.node-help-content')
  await content.locator('table').first().waitFor({ timeout: SHOW })
  return content.evaluate((content) => {
    const edge = content.getBoundingClientRect().right
    const wide = [...content.querySelectorAll('td, p, li')].filter((part) => part.getBoundingClientRect().right > edge + 1)
    return { text: content.innerText, wide: wide.map((part) => part.innerText) }
  })
}

async function load(page, { file, id }) {
  // While the editor still loads the graph before, it takes none.
  await ready(page)
  await drop(page, file)
  await page.waitForFunction((id) => window.app.graph.id === id, id, { timeout: READY })
  await drawn(page)
  // The editor renders a note after everything else.
  await page.locator(NOTE).filter({ visible: true }).first().waitFor({ timeout: SHOW })
  await page.waitForFunction(
    () => {
      const boxes = [...document.querySelectorAll('[data-node-id]')].map((element) => element.getBoundingClientRect())
      const before = window.boxes
      window.boxes = JSON.stringify(boxes)
      return window.boxes === before
    },
    undefined,
    { polling: 300, timeout: SHOW }
  )
}

main(async (page, job, report) => {
  const mode = job.nodes2 ? 'nodes2' : 'classic'
  const results = {}
  for (const graph of job.graphs.filter(({ changes }) => changes)) {
    await load(page, graph)
    const view = await page.evaluate(() => [...window.app.canvas.ds.offset])
    results[graph.name] = await run(page, graph.changes, job)
    await drawn(page)
    await page.screenshot({ path: `${job.pictures}/${graph.name}-${mode}-result.png` })
    await page.evaluate((view) => window.app.canvas.ds.offset.splice(0, 2, ...view), view)
  }
  // Nodes 2.0 shows the pictures of a run on the next graph's nodes of the same numbers.
  await page.reload()
  await ready(page)
  report.graphs = {}
  for (const graph of job.graphs) {
    await load(page, graph)
    const found = await page.evaluate(seen)
    found.prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output)
    await page.screenshot({ path: `${job.pictures}/${graph.name}-${mode}.png` })
    report.graphs[graph.name] = { ...found, result: results[graph.name] }
  }
  report.help = {}
  for (const type of job.help) {
    report.help[type] = await help(page, type)
    await page.screenshot({ path: `${job.pictures}/help-${type}-${mode}.png` })
  }
})
