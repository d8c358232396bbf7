// What the views on nodes share: elements, pictures of the server, and the canvas around them.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

/** The classic canvas keeps so much free above and below a widget. */
const MARGIN = 10

export function addStyle(text) {
  const sheet = new CSSStyleSheet()
  sheet.replaceSync(text)
  document.adoptedStyleSheets.push(sheet)
}

/** A function that makes elements of class `<prefix>-<name>`: properties, attributes (those with a dash, and `role`), children. */
export function maker(prefix) {
  return (tag, name, properties = {}, ...children) => {
    const element = document.createElement(tag)
    if (name) element.className = `${prefix}-${name}`
    for (const [key, value] of Object.entries(properties)) {
      if (key === 'role' || key.includes('-')) element.setAttribute(key, value)
      else element[key] = value
    }
    element.append(...children)
    return element
  }
}

export function button(text, title, onclick, label = text) {
  return maker('')('button', '', { type: 'button', textContent: text, title, onclick, 'aria-label': label })
}

export function address(file) {
  return file ? api.apiURL(`/view?${new URLSearchParams(file)}`) : ''
}

/** Lets an image show an address, or nothing where it is empty; loads nothing twice. */
export function point(image, source) {
  image.hidden = !source
  if (source && image.getAttribute('src') !== source) image.src = source
}

/** Panning with the middle button goes on over an element, and zooming with the wheel where `keepsWheel` does not say otherwise. */
export function forwardToCanvas(element, keepsWheel = () => false) {
  const handlers = { pointerdown: 'processMouseDown', pointermove: 'processMouseMove', pointerup: 'processMouseUp' }
  for (const [type, handler] of Object.entries(handlers)) {
    element.addEventListener(type, (event) => {
      if (event.button === 1 || event.buttons & 4) app.canvas[handler](event)
    })
  }
  element.addEventListener('wheel', (event) => {
    // In Nodes 2.0 the node around it does this.
    if (keepsWheel(event) || element.closest('[data-node-id]')) return
    event.preventDefault()
    app.canvas.processMouseWheel(event)
  })
}

/** The node whose outputs the editor keeps under this key: its id, in a subgraph after that one's id and a colon. */
export function nodeAt(key) {
  const [id, graphId] = String(key).split(':').reverse()
  const graph = graphId ? app.rootGraph.subgraphs.get(graphId) : app.rootGraph
  return graph?.getNodeById(id)
}

/** Puts `view.element` into a node, at least so high, and makes the node at least so large; `view.show(output)` after each run. */
export function addView(node, name, view, minHeight, size) {
  const widget = node.addDOMWidget(name, view.element.className, view.element, {
    getMinHeight: () => minHeight + 2 * MARGIN,
    hideOnZoom: false,
    // The panel at the side would take the element out of the node.
    hideInPanel: true,
    serialize: false
  })
  widget.serialize = false
  node.setSize(size.map((length, axis) => Math.max(length, node.size[axis])))
  onResult(node, (output) => view.show(output))
}

/** Calls `show(output)` after each run of a node. */
function onResult(node, show) {
  const onExecuted = node.onExecuted
  node.onExecuted = function (output, ...rest) {
    onExecuted?.call(this, output, ...rest)
    show(output)
  }
}
