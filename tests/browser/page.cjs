// A page with the editor, for the drivers of this folder's tests: `node <driver>.cjs '<job>'`.
// A job has at least {"address", "chromium", "nodes2", "pictures"}: of ComfyUI, of the browser, the mode, and where screenshots go;
// and may have the "language" of the editor.
'use strict'

const path = require('node:path')

const { chromium } = require('playwright-core')

const READY = 60_000

async function post(address, route, body) {
  const answer = await fetch(address + route, { method: 'POST', body: JSON.stringify(body) })
  if (!answer.ok) throw new Error(`${route} answered ${answer.status}`)
}

/** Sets widgets of nodes, also of those within a blueprint: {node type: {widget: value}}. */
async function change(page, changes) {
  await page.evaluate((changes) => {
    const nodes = window.app.graph.nodes.flatMap((node) => node.subgraph?.nodes ?? [node])
    for (const [type, values] of Object.entries(changes)) {
      const found = nodes.filter((node) => node.type === type)
      if (found.length === 0) throw new Error(`no node of type ${type}`)
      for (const node of found) {
        for (const [name, value] of Object.entries(values)) {
          node.widgets.find((widget) => widget.name === name).value = value
        }
      }
    }
  }, changes)
}

/** Asks ComfyUI for a route until what it answers is what is waited for, and returns that. */
async function answered(address, route, wanted, timeout) {
  // The page's own waitForFunction takes a promise for an answer.
  for (const end = Date.now() + timeout; Date.now() < end; await new Promise((done) => setTimeout(done, 200))) {
    const found = wanted(await (await fetch(address + route)).json())
    if (found) return found
  }
  throw new Error(`${route} did not come to what is waited for`)
}

/** Waits until what was changed is on the screen. */
async function drawn(page) {
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))
}

async function ready(page) {
  await page.waitForFunction(
    () =>
      window.app?.extensionManager &&
      window.app.graph &&
      document.querySelector('[data-testid="queue-button"]') &&
      !document.querySelector('.p-blockui-mask'),
    undefined,
    { timeout: READY }
  )
  await drawn(page)
}

async function open(browser, job, report) {
  const page = await browser.newPage({ viewport: { width: 1920, height: 1080 } })
  page.on('pageerror', (error) => report.pageErrors.push(String(error)))
  await page.route('**/*', (route) => {
    const { protocol, origin } = new URL(route.request().url())
    const allowed = origin === job.address || protocol === 'data:' || protocol === 'blob:'
    return allowed ? route.continue() : route.abort()
  })
  await page.goto(job.address)
  await ready(page)
  return page
}

async function drive(scenario) {
  const job = JSON.parse(process.argv[2])
  await post(job.address, '/api/settings', {
    'Comfy.TutorialCompleted': true,
    'Comfy.InstalledVersion': '99.0.0',
    'Comfy.VueNodes.Enabled': job.nodes2,
    'Comfy.Locale': job.language ?? 'en',
    // An earlier page may have left it open.
    'Comfy.RightSidePanel.IsOpen': false
  })
  const report = { pageErrors: [] }
  const options = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu']
  const browser = await chromium.launch({ executablePath: job.chromium, args: options })
  let page
  try {
    page = await open(browser, job, report)
    await scenario(page, job, report)
  } catch (error) {
    const driver = path.basename(process.argv[1], '.cjs')
    await page?.screenshot({ path: `${job.pictures}/failure-${driver}-${job.nodes2 ? 'nodes2' : 'classic'}.png` })
    throw error
  } finally {
    await browser.close()
  }
  console.log(JSON.stringify(report))
}

/** Runs `scenario(page, job, report)` and prints the report, what was seen in the page, as JSON. */
exports.main = (scenario) =>
  drive(scenario).catch((error) => {
    console.error(error)
    process.exitCode = 1
  })
Object.assign(exports, { READY, answered, change, drawn, ready })
