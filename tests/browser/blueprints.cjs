// Puts blueprints on the canvas in chromium, for test_blueprints.py: a job has "blueprints": [{"name", "file", "changes"}] (page.cjs
// says what else). The first is taken out of the editor's node search. Each input without a widget gets a picture or mask of its own,
// the first output is saved; what the editor would queue goes to standard output as JSON. One that has `changes` (node type, widget,
// value), of nodes within it, is run with them.
'use strict'

const { readFileSync } = require('node:fs')

const { answered, change, drawn, main } = require('./page.cjs')

const SHOW = 15_000
const RUN = 180_000

async function fromSearch(page, name) {
  await page.evaluate(() => window.app.graph.clear())
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle'))
  const box = page.locator('[role="dialog"] input:visible').first()
  await box.waitFor({ timeout: SHOW })
  await box.fill(name)
  const selected = page.locator('[data-testid="result-item"][aria-selected="true"]')
  await selected.filter({ hasText: name }).waitFor({ timeout: SHOW })
  await page.keyboard.press('Enter')
  await page.waitForFunction(() => window.app.graph.nodes.length === 1, undefined, { timeout: SHOW })
}

const wired = () => {
  const { app, LiteGraph } = window
  const [node] = app.graph.nodes
  const sources = {}
  const fed = node.inputs.filter((input) => !input.widget)
  fed.forEach((input) => {
    const source = LiteGraph.createNode('TrueFillExamplePhoto')
    app.graph.add(source)
    source.connect(input.type === 'MASK' ? 1 : 0, node, node.inputs.indexOf(input))
    sources[input.name] = String(source.id)
  })
  const save = LiteGraph.createNode('SaveImage')
  app.graph.add(save)
  node.connect(0, save, 0)
  return {
    sources,
    title: node.title,
    broken: node.subgraph.nodes.filter(({ type }) => !LiteGraph.registered_node_types[type]).map(({ type }) => type),
    widgets: node.widgets.map((widget) => widget.label ?? widget.name),
    outputs: node.outputs.map((output) => output.name)
  }
}

async function run(page, job, changes) {
  await change(page, changes)
  const queued = page.waitForResponse((response) => response.url().endsWith('/prompt') && response.request().method() === 'POST')
  await page.click('[data-testid="queue-button"]')
  const { prompt_id: id } = await (await queued).json()
  return answered(job.address, `/history/${id}`, (history) => history[id], RUN)
}

main(async (page, job, report) => {
  report.blueprints = {}
  for (const [turn, { name, file, changes }] of job.blueprints.entries()) {
    // As a person finds it; the others as what the search gives, which sticks to the mouse until it is put down.
    if (turn === 0) await fromSearch(page, name)
    else await page.evaluate((graph) => window.app.loadGraphData(graph), JSON.parse(readFileSync(file, 'utf8')))
    const found = await page.evaluate(wired)
    await drawn(page)
    found.prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output)
    if (changes) found.ended = await run(page, job, changes)
    await page.screenshot({ path: `${job.pictures}/blueprint-${name}-${job.nodes2 ? 'nodes2' : 'classic'}.png` })
    report.blueprints[name] = found
  }
})
